"""Calls remembered: one that is like the last with its mask goes the same way at once, by an op or past it.

A layer of a small network is over in some tens of microseconds. To look at its operands, its layout and the plan takes
as long, and says the same in almost every step. Large layers leave nothing of that in the caches, and it takes several
times as long there.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled

from granet_kernels import plan
from granet_kernels.cpu_backend import dense, library
from granet_kernels.cpu_backend.calls import Call
from granet_kernels.eager import is_eager_code, packs_saved_tensors
from granet_kernels.layout import SparseLayout

_by_mask: dict[int, Settled] = {}  # by id


class Settled:
    """What a call has to have in common with the one remembered, for the same work to be right.

    Args:
        x, weight, mask, bias, dense_wgrad, geometry: of that call, as the caller gave them, on a CPU.
        layout: of the mask.
        sites: of the plan, to be asked again whether they agree on dense code; none where that is certain.
        call: what was found for the operands.
        full: whether the mask keeps everything.
        by_op: whether it went through the op. If not, torch's own layer took the weight, which was zero off the mask.

    Attributes:
        layout, call, full, by_op: as given.
    """

    __slots__ = (
        "_bias",
        "_dense_wgrad",
        "_mask",
        "_mode",
        "_sites",
        "_traits",
        "_weight",
        "by_op",
        "call",
        "full",
        "layout",
    )

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        dense_wgrad: Tensor | None,
        geometry: Sequence[Any],
        layout: SparseLayout,
        sites: Sequence[plan.Site],
        call: Call | None,
        full: bool,
        by_op: bool,
    ) -> None:
        key = id(mask)
        self._mask = weakref.ref(mask, lambda _: _by_mask.pop(key, None))
        self._weight = weakref.ref(weight)
        self._bias = None if bias is None else weakref.ref(bias)
        self._dense_wgrad = dense_wgrad
        self._traits = _traits(x, weight, mask, bias, geometry)
        self._mode = plan.mode()
        self._sites = sites
        self.layout, self.call, self.full, self.by_op = layout, call, full, by_op

    def covers(
        self,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        dense_wgrad: Tensor | None,
        geometry: Sequence[Any],
    ) -> bool:
        """Whether this call is like the one remembered, and the plan, which counts it, still says the same.

        For callers that know that nothing is being compiled.
        """
        return (
            self._mask() is mask
            and self._weight() is weight
            and (bias is None if self._bias is None else self._bias() is bias)
            and dense_wgrad is self._dense_wgrad
            and isinstance(x, Tensor)
            and is_eager_code(x)
            and _traits(x, weight, mask, bias, geometry) == self._traits
            and not is_autocast_enabled("cpu")
            and not packs_saved_tensors()
            and plan.mode() == self._mode
            and (self.call is None or self.call.supported)
            and (self.by_op or self.full or dense.is_zero_off(weight, mask))
            and (not self._sites or plan.agrees_on_dense(self._sites, self.layout) != self.by_op)
        )


def find(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_wgrad: Tensor | None,
    geometry: Sequence[Any] = (),
) -> Settled | None:
    """What is remembered of a call like this one, whose operands nobody has looked at; None if nothing is."""
    if torch.compiler.is_compiling():
        return None
    found = _by_mask.get(id(mask))
    if found is None or not found.covers(x, weight, mask, bias, dense_wgrad, geometry):
        return None
    return found


def keep(mask: Tensor, settled: Settled) -> None:
    """Remember a call in the place of the last one with its mask."""
    _by_mask[id(mask)] = settled


def forget(mask: Tensor) -> None:
    """Remember no call with this mask: one went another way."""
    _by_mask.pop(id(mask), None)


def _traits(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, geometry: Sequence[Any]) -> tuple[Any, ...]:
    """What was looked at, or follows from it."""
    return (
        *(x.is_cpu, x.dtype, x.shape, x.stride(), x.requires_grad),
        *(weight.is_cpu, weight.dtype, weight.shape, weight.stride(), weight.requires_grad),
        *(mask._version, mask.data_ptr(), geometry, library.threads()),
        None if bias is None else (bias.dtype, bias.shape),
    )
