"""SparseLinear and SparseConv2d: torch's layers, whose weight may carry a mask.

A layer starts unbound and computes what its torch class computes. A Sparsifier binds it: from then on forward, input
gradient and weight gradient run on `granet_kernels` and see only the kept positions. The weight stays the dense
Parameter it was, under the same name, so optimizers, state_dict, AMP and DDP work as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import granet_kernels
from granet.granularity import Granularity, parse
from granet_kernels.layout import trust_version


class SparseLayer(nn.Module):
    """What SparseLinear and SparseConv2d share: a weight, its granularity, and a mask while a Sparsifier owns it.

    Attributes:
        granularity: what one unit of sparsity is.
        mask: bool of the weight's shape, True = kept; None while unbound.
        dense_wgrad: 0-dim bool CPU tensor of the Sparsifier; while it is true, backward delivers the dense gradient.
    """

    weight: Tensor
    granularity: Granularity
    mask: Tensor | None
    dense_wgrad: Tensor | None

    def bind(self, mask: Tensor, dense_wgrad: Tensor) -> None:
        """Compute with `mask` from now on. The mask may be changed in place afterwards."""
        trust_version(mask)
        self.mask = mask
        self.dense_wgrad = dense_wgrad

    def unbind(self) -> None:
        """Be an ordinary dense layer again."""
        self.mask = None
        self.dense_wgrad = None

    def _mask_beside(self, weight: Tensor) -> Tensor | None:
        """The mask, on the weight's device: the replicas of nn.DataParallel share one."""
        mask = self.mask
        return mask if mask is None or mask.device == weight.device else mask.to(weight.device)

    # The mask is not a buffer: DDP would broadcast it at every forward, and an averaged copy of the model (EMA) would
    # average it. So it has to follow the module's .to() by itself.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.mask is not None:
            self.mask = fn(self.mask).bool()  # .type(torch.float64) converts masks, too
            trust_version(self.mask)
        return self

    # A copy (EMA, the best model so far, a pickled model) is not trained by the Sparsifier: its weights may hold a mean
    # over several masks, so it computes with all of its weights.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mask": None, "dense_wgrad": None}


class SparseLinear(SparseLayer, nn.Linear):
    """nn.Linear whose weight can be sparse. Same arguments, same Parameters, same state_dict keys.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        granularity: "unstructured", "block:16x16", "2:4", "filter", or a Granularity.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        granularity: Granularity | str = "unstructured",
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        _make_sparse(self, parse(granularity))

    def forward(self, input: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        mask = self._mask_beside(weight)
        if mask is None:
            return F.linear(input, weight, bias)
        input, weight, bias = _autocast(input, weight, bias)
        return granet_kernels.linear(input, weight, mask, bias, self.dense_wgrad)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, granularity={self.granularity}"


class SparseConv2d(SparseLayer, nn.Conv2d):
    """nn.Conv2d whose weight can be sparse. Same arguments, same Parameters, same state_dict keys.

    Args:
        *args, **kwargs: as for nn.Conv2d, padding modes and groups included.
        granularity: "unstructured", "block:16x16", "2:4", "filter", or a Granularity; the weight is seen as
            (out_channels, in_channels / groups * kh * kw).
    """

    def __init__(self, *args: Any, granularity: Granularity | str = "unstructured", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _make_sparse(self, parse(granularity))

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        mask = self._mask_beside(weight)
        if mask is None:
            return super()._conv_forward(input, weight, bias)
        input, weight, bias = _autocast(input, weight, bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return granet_kernels.conv2d(
            input, weight, mask, bias, self.stride, padding, self.dilation, self.groups, self.dense_wgrad
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, granularity={self.granularity}"


SPARSE_CLASS: dict[type[nn.Module], type[SparseLayer]] = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}


def convert(module: nn.Module, granularity: Granularity) -> None:
    """Turn an nn.Linear or nn.Conv2d into its sparse class, in place: parameters, hooks and references stay."""
    module.__class__ = SPARSE_CLASS.get(type(module), type(module))
    assert isinstance(module, SparseLayer)
    _make_sparse(module, granularity)


def _make_sparse(module: SparseLayer, granularity: Granularity) -> None:
    granularity.units(tuple(module.weight.shape))  # raises if it does not fit
    module.granularity = granularity
    module.mask = None
    module.dense_wgrad = None


def _autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast casts the operands of F.linear and F.conv2d: floats but float64, where it is enabled."""
    device = input.device.type
    if input.is_meta or not torch.is_autocast_enabled(device):  # autocast knows no meta device
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)
