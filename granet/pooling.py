"""Max-pooling of 2 x 2 pixels, computed natively where that is possible."""

from __future__ import annotations

from torch import Tensor, nn

import granet_kernels
from granet.native import is_native_image, traced


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d, computed natively on a CPU if it halves an image. Same arguments and results."""

    def forward(self, input: Tensor) -> Tensor:
        leaf = traced(self, input)
        if leaf is not None:
            return leaf
        if self._halves() and is_native_image(input) and min(input.shape[2:]) >= 2:
            return granet_kernels.max_pool(input)
        y: Tensor = super().forward(input)
        return y

    def _halves(self) -> bool:
        settings = (self.kernel_size, self.stride, self.padding, self.dilation)
        pairs = [value if isinstance(value, tuple) else (value, value) for value in settings]
        return pairs == [(2, 2), (2, 2), (0, 0), (1, 1)] and not self.ceil_mode and not self.return_indices
