"""Exact selection over score buffers: top-k masks, drop and grow, over all units at once or per segment.

One op, granet::topk_mask, whose counts and offsets lie in CPU memory; drop and grow are two uses of it. The result
depends on the order of the scores alone, so it is the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from granet_kernels.checks import check_like
from granet_kernels.reference import topk_mask_ref

Ints = Sequence[int] | Tensor
Scores = Tensor | Sequence[Tensor]


def topk_mask_of_parts(
    scores: Sequence[Tensor], counts: Tensor, offsets: Tensor, eligible: Tensor | None, absolute: bool
) -> Tensor:
    """What the op computes: `topk_mask_ref` of the parts of the scores, laid end to end."""
    flat = scores[0].reshape(-1) if len(scores) == 1 else torch.cat([part.reshape(-1) for part in scores])
    return topk_mask_ref(flat.abs() if absolute else flat, counts, offsets, eligible)


topk_mask_op = torch.library.custom_op(
    "granet::topk_mask",
    topk_mask_of_parts,
    mutates_args=(),
    schema="(Tensor[] scores, Tensor counts, Tensor offsets, Tensor? eligible, bool absolute) -> Tensor",
)


def topk_mask(
    scores: Scores,
    counts: int | Ints,
    offsets: Ints | None = None,
    eligible: Tensor | None = None,
    *,
    absolute: bool = False,
) -> Tensor:
    """True for the counts[s] highest-scored eligible units of each segment s, and for exactly so many.

    Ties go to the lower index. -0 equals +0, NaN ranks above inf.

    Args:
        scores: (units,) float32 of any sign; or a list of float32 tensors of any shape, e.g. the weights of all layers,
            that stand for their elements in row-major order, one tensor after the other. They are read in place.
        counts: (S,) int64, how many to select in each segment; an int stands for every segment.
        offsets: (S+1,) int64 from 0 to units, never falling: segment s is scores[offsets[s]:offsets[s+1]]. None is one
            segment of all units.
        eligible: (units,) bool, None = all.
        absolute: rank by |score|.
    Returns:
        (units,) bool on the device of scores.
    Raises:
        ValueError: a shape, dtype, device or offset is wrong, or a count is negative or more than is eligible.
    """
    parts, bounds = check_buffers("topk_mask", scores, offsets, "eligible", eligible)
    sizes = bounds.diff() if eligible is None else _true_per_segment(eligible, bounds)
    vector = _check_counts("topk_mask", "counts", counts, sizes, "eligible units")
    mask: Tensor = topk_mask_op(parts, vector, bounds, eligible, absolute)
    return mask


def drop(
    scores: Scores, kept: Tensor, n_drop: int | Ints, offsets: Ints | None = None, *, absolute: bool = False
) -> Tensor:
    """The kept units without the n_drop[s] lowest-scored kept ones of each segment s.

    Of equal scores the higher index is dropped first.

    Args:
        scores: as for topk_mask, e.g. the weights.
        kept: (units,) bool.
        n_drop: (S,) int64, 0 <= n_drop[s] <= kept units of segment s; an int stands for every segment.
        offsets, absolute: as for topk_mask.
    Returns:
        (units,) bool with n_drop[s] fewer kept in segment s.
    Raises:
        ValueError: a shape, dtype, device, offset or count is wrong.
    Source: SET, arXiv:1707.04780; RigL, arXiv:1911.11134; GraNet, arXiv:2106.10404, eq. 2.
    """
    parts, bounds = check_buffers("drop", scores, offsets, "kept", kept)
    nnz = _true_per_segment(kept, bounds)
    counts = _check_counts("drop", "n_drop", n_drop, nnz, "kept units")
    left: Tensor = topk_mask_op(parts, nnz - counts, bounds, kept, absolute)
    return left


def grow(
    scores: Scores, kept: Tensor, n_grow: int | Ints, offsets: Ints | None = None, *, absolute: bool = False
) -> Tensor:
    """The kept units and the n_grow[s] highest-scored ones that are not kept of each segment s.

    Units just dropped are eligible like any other. Ties go to the lower index.

    Args:
        scores: as for topk_mask, e.g. the dense gradients.
        kept: (units,) bool.
        n_grow: (S,) int64, 0 <= n_grow[s] <= units of segment s that are not kept; an int stands for every segment.
        offsets, absolute: as for topk_mask.
    Returns:
        (units,) bool with n_grow[s] more kept in segment s.
    Raises:
        ValueError: a shape, dtype, device, offset or count is wrong.
    Source: RigL, arXiv:1911.11134; GraNet, arXiv:2106.10404, eq. 3.
    """
    parts, bounds = check_buffers("grow", scores, offsets, "kept", kept)
    free = bounds.diff() - _true_per_segment(kept, bounds)
    counts = _check_counts("grow", "n_grow", n_grow, free, "units that are not kept")
    grown: Tensor = topk_mask_op(parts, counts, bounds, ~kept, absolute)
    return grown.logical_or_(kept)


def _true_per_segment(units: Tensor, offsets: Tensor) -> Tensor:
    """(units,) bool, (S+1,) int64 -> (S,) int64 in CPU memory: how many are True in each segment."""
    # A sum of bools is many times slower.
    return torch.stack([units[begin:end].count_nonzero() for begin, end in pairwise(offsets.tolist())]).cpu()


def check_buffers(
    op: str, scores: Scores, offsets: Ints | None, name: str, units: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Raise ValueError unless scores, offsets and the named bool buffer of units fit; the parts of the scores, and the
    offsets on the cpu."""
    if isinstance(scores, Tensor) and scores.dim() != 1:
        raise ValueError(f"{op}: expected scores of shape (units,), got shape {tuple(scores.shape)}")
    parts = [scores] if isinstance(scores, Tensor) else list(scores)
    if not parts:
        raise ValueError(f"{op}: expected scores as a tensor or a list of one tensor or more, got none")
    for part in parts:
        check_like(op, "scores", part, torch.float32, parts[0].device)
    total = sum(part.numel() for part in parts)
    if units is not None:
        check_like(op, name, units, torch.bool, parts[0].device)
        if units.shape != (total,):
            raise ValueError(f"{op}: expected {name} of the scores' shape ({total},), got shape {tuple(units.shape)}")
    if offsets is None:
        return parts, torch.tensor([0, total], device="cpu")
    bounds = int64_vector(op, "offsets", offsets)
    if bounds.numel() < 2 or bounds[0] != 0 or bounds[-1] != total or (bounds.diff() < 0).any():
        raise ValueError(
            f"{op}: expected offsets that rise from 0 to the number of units {total}, got {bounds.tolist()}"
        )
    return parts, bounds


def _check_counts(op: str, name: str, counts: int | Ints, available: Tensor, what: str) -> Tensor:
    """Raise ValueError unless there is one count a segment, none negative or above what is available; the counts."""
    if isinstance(counts, int):
        counts = [counts] * available.numel()
    vector = int64_vector(op, name, counts)
    if vector.shape != available.shape:
        raise ValueError(f"{op}: expected one of {name} per segment, {available.numel()} in all, got {vector.numel()}")
    for segment in ((vector < 0) | (vector > available)).nonzero().flatten().tolist():
        raise ValueError(
            f"{op}: expected 0 <= {name} <= {available[segment]} ({what}) in segment {segment}, got {vector[segment]}"
        )
    return vector


def int64_vector(op: str, name: str, values: Ints) -> Tensor:
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, device="cpu")
    if tensor.dim() != 1 or (tensor.dtype != torch.int64 and tensor.numel()):
        raise ValueError(
            f"{op}: expected {name} to be a vector of int64, got shape {tuple(tensor.shape)} of {tensor.dtype}"
        )
    return tensor.to("cpu", torch.int64)


@topk_mask_op.register_fake
def _topk_mask_fake(
    scores: Sequence[Tensor], counts: Tensor, offsets: Tensor, eligible: Tensor | None, absolute: bool
) -> Tensor:
    return scores[0].new_empty(sum(part.numel() for part in scores), dtype=torch.bool)


@register_flop_formula(torch.ops.granet.topk_mask)
def _topk_mask_flops(*shapes: Any, **kwargs: Any) -> int:
    return 0  # comparisons are no floating-point operations
