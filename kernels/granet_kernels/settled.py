"""Calls remembered: one that is like the last with its mask goes the same way at once, by an op or past it.

A layer of a small network is over in some tens of microseconds. To look at its operands, its layout and the plan takes
as long, and says the same in almost every step. Large layers leave nothing of that in the caches, and it takes several
times as long there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_autocast_enabled

from granet_kernels import plan
from granet_kernels.cpu_backend import dense, library
from granet_kernels.cpu_backend.calls import Call
from granet_kernels.eager import is_eager_code, packs_saved_tensors
from granet_kernels.layout import SparseLayout, known_layout


class Settled:
    """What a call has to have in common with the one remembered, for the same work to be right.

    It hangs on the layout of the mask, which says whether the mask is the same, and refers to none of the operands.

    Args:
        x, weight, mask, bias, dense_wgrad, geometry: of that call, as the caller gave them, on a CPU.
        sites: of the plan, to be asked again whether they agree on dense code; none where they need not be.
        call: what was found for the operands.
        full: whether the mask keeps everything.
        by_op: whether it went through the op. If not, torch's own layer took the weight, which was zero off the mask.

    Attributes:
        geometry, call, full, by_op: as given.
    """

    __slots__ = ("_dense_wgrad", "_mode", "_sites", "_traits", "by_op", "call", "full", "geometry")

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        dense_wgrad: Tensor | None,
        geometry: Sequence[Any],
        sites: Sequence[plan.Site],
        call: Call | None,
        full: bool,
        by_op: bool,
    ) -> None:
        self._dense_wgrad = dense_wgrad
        self._traits = _traits(x, weight, mask, bias)
        self._mode = plan.mode()
        self._sites = sites
        self.geometry, self.call, self.full, self.by_op = geometry, call, full, by_op

    def covers(
        self,
        x: Tensor,
        weight: Tensor,
        mask: Tensor,
        bias: Tensor | None,
        dense_wgrad: Tensor | None,
        geometry: Sequence[Any],
        layout: SparseLayout,
    ) -> bool:
        """Whether this call is like the one remembered, and the plan, which counts it, still says the same.

        For operands of which `is_eager` is true, and the layout of this mask.
        """
        return (
            dense_wgrad is self._dense_wgrad
            and _traits(x, weight, mask, bias) == self._traits
            and _agree(geometry, self.geometry)
            and not is_autocast_enabled("cpu")
            and not packs_saved_tensors()
            and plan.mode() == self._mode
            and (self.call is None or self.call.supported)
            and (self.by_op or self.full or dense.is_zero_off(weight, mask))
            and (not self._sites or plan.agrees_on_dense(self._sites, layout) != self.by_op)
        )


def find(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_wgrad: Tensor | None,
    geometry: Sequence[Any] = (),
) -> tuple[Settled, SparseLayout] | None:
    """What is remembered of a call like this one, whose operands nobody has looked at; None if nothing is."""
    if torch.compiler.is_compiling() or not is_eager_code(x, weight, mask, bias):
        return None
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(mask, Tensor) and mask.is_cpu):
        return None
    layout = known_layout(mask)
    found: Settled | None = None if layout is None else layout.settled
    if layout is None or found is None or not layout.is_of(mask):
        return None
    return (found, layout) if found.covers(x, weight, mask, bias, dense_wgrad, geometry, layout) else None


def _traits(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """What was looked at, or follows from it."""
    return (
        *(x.is_cpu, x.dtype, x.shape, x.stride(), x.requires_grad),
        *(weight.is_cpu, weight.dtype, weight.shape, weight.stride(), weight.requires_grad, weight.is_leaf),
        *(mask.dtype, library.threads()),
        None if bias is None else (bias.is_cpu, bias.dtype, bias.shape),
    )


def _agree(geometry: Sequence[Any], known: Sequence[Any]) -> bool:
    """Whether a geometry is the known one, in ints, of which 1.0 is none."""
    return geometry == known and all(type(number) is int for pair in geometry[:3] for number in pair)
