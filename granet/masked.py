"""MaskedParameter: a weight that other code multiplies, kept sparse by masking its gradient.

Some weights are used by code that no layer of ours can replace: nn.MultiheadAttention hands its projections to one
fused function, a subclass of nn.Linear has a forward of its own, a Conv1d has no sparse kernel. Their products stay
dense; a hook on the Parameter zeroes the gradient off the mask, so that everything else is as for a SparseLayer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from granet.granularity import Granularity

ATTRIBUTE = "granet_masked_parameters"


class MaskedParameter:
    """One weight of `module`, e.g. "in_proj_weight" or "out_proj.weight", and its mask while a Sparsifier owns it.

    It answers to the same names as a SparseLayer: weight, granularity, mask, bind, unbind.
    """

    def __init__(self, module: nn.Module, path: str, granularity: Granularity) -> None:
        self.module = module
        self.path = path
        self.granularity = granularity
        self.mask: Tensor | None = None
        self.dense_wgrad: Tensor | None = None
        self._hook: RemovableHandle | None = None
        granularity.units(tuple(self.weight.shape))  # raises if it does not fit

    @property
    def weight(self) -> nn.Parameter:
        return self.module.get_parameter(self.path)

    def bind(self, mask: Tensor, dense_wgrad: Tensor) -> None:
        """Keep the gradient of the weight zero off `mask` from now on."""
        self.unbind()
        self.mask = mask
        self.dense_wgrad = dense_wgrad
        self._hook = self.weight.register_hook(self._mask_gradient)

    def unbind(self) -> None:
        """Let the whole gradient through again."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.mask = self.dense_wgrad = None

    def _mask_gradient(self, gradient: Tensor) -> Tensor:
        assert self.mask is not None
        assert self.dense_wgrad is not None
        if bool(self.dense_wgrad):
            return gradient
        if self.mask.device != gradient.device:  # the module was moved
            self.mask = self.mask.to(gradient.device)
        return gradient.masked_fill(~self.mask, 0)

    # A copy of the module is not trained by the Sparsifier (see SparseLayer).
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "mask": None, "dense_wgrad": None, "_hook": None}


def attach(module: nn.Module, path: str, granularity: Granularity) -> None:
    """Declare one weight of `module` as masked; a Sparsifier finds it there."""
    masked = MaskedParameter(module, path, granularity)
    module.__dict__.setdefault(ATTRIBUTE, {})[path] = masked


def attached(module: nn.Module) -> dict[str, MaskedParameter]:
    """The masked weights declared on `module`, by their path in it."""
    return module.__dict__.get(ATTRIBUTE, {})
