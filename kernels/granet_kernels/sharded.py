"""Exact selection over scores that several processes hold together, none of them all.

Each process counts its scores by the next digits of their keys, and the sum of these counts over all processes tells
every one of them the next digits of the threshold. Scores never travel, only 2048 counts a segment, three times.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from granet_kernels.reference import sort_keys
from granet_kernels.topk import Ints, Scores, check_buffers, int64_vector, topk_mask_op

_DIGITS = ((21, 2**11), (10, 2**11), (0, 2**10))
"""Of a key of 32 bits, from the top: the lowest bit of each digit, and how many values it has."""

_LEAST_KEY = -(2**31)


def sharded_topk_mask(
    scores: Scores,
    counts: int | Ints,
    offsets: Ints | None = None,
    eligible: Tensor | None = None,
    *,
    absolute: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """This process's part of the mask that `topk_mask` would give for the scores of all processes in one buffer.

    Segment s of that buffer is the segment s of the first process, then that of the second, and so on; of equal scores
    those of the lower rank come first. A process may hold none of a segment, or nothing at all. Every process of the
    group has to make this call.

    Args:
        scores, offsets, eligible, absolute: as for topk_mask, what this process holds. All have as many segments.
        counts: (S,) int64, how many to select in each segment, over all processes; the same everywhere. An int stands
            for every segment.
        group: None is the default group.
    Returns:
        (units,) bool for the units that this process holds.
    Raises:
        ValueError: an argument is wrong, as for topk_mask; processes disagree about the segments or counts; a count is
            negative or more than is eligible. Errors of the last two kinds are raised by all processes.
    """
    op = "sharded_topk_mask"
    parts, bounds = check_buffers(op, scores, offsets, "eligible", eligible)
    segments = bounds.numel() - 1
    wanted = int64_vector(op, "counts", [counts] * segments if isinstance(counts, int) else counts)
    device = parts[0].device
    _check_agreement(op, wanted, segments, device, group)
    keys = [_keys(op, parts, eligible, absolute)[begin:end] for begin, end in pairwise(bounds.tolist())]
    left = wanted.to(device)
    prefix = torch.zeros_like(left)
    # A key counts on while its upper digits are those of the threshold; of the rest nothing has to be known any more.
    candidates = [_biased(each[each != _LEAST_KEY]) for each in keys]
    _check_counts(op, wanted, candidates, device, group)
    for shift, values in _DIGITS:
        histogram = torch.stack(
            [torch.bincount((each >> shift) & (values - 1), minlength=values) for each in candidates]
        )
        dist.all_reduce(histogram, group=group)
        digit, left = _digit_of(histogram, left)
        prefix |= digit << shift
        candidates = [
            each[(each >> shift) == (own >> shift)] for each, own in zip(candidates, prefix.unbind(), strict=True)
        ]
    return topk_mask_op(parts, _own_counts(keys, prefix, left, wanted, group), bounds, eligible, absolute)


def _keys(op: str, parts: list[Tensor], eligible: Tensor | None, absolute: bool) -> Tensor:
    """(units,) int32: reference.sort_keys, and below them all where a unit is not eligible."""
    flat = torch.cat([part.reshape(-1) for part in parts])
    keys = sort_keys(flat.abs() if absolute else flat)
    return keys if eligible is None else torch.where(eligible, keys, _LEAST_KEY)


def _biased(keys: Tensor) -> Tensor:
    """The keys as numbers from 0 to 2^32 - 1, int64."""
    return keys.long() + 2**31


def _digit_of(histogram: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """(S, values) counts by digit, (S,) ranks from the top -> the digit that has the rank, and the rank within it."""
    from_top = histogram.flip(1).cumsum(1)
    place = (from_top < left[:, None]).sum(1).clamp(max=histogram.shape[1] - 1)
    above = torch.where(place > 0, from_top.gather(1, (place - 1).clamp(min=0)[:, None])[:, 0], 0)
    return histogram.shape[1] - 1 - place, left - above


def _own_counts(
    keys: list[Tensor], threshold: Tensor, left: Tensor, wanted: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """(S,) int64 on the cpu: how many units this process has to select.

    Args:
        keys: of each segment.
        threshold, left: the biased key of the last unit to select, and how many of that key to select in all.
    """
    limits = (threshold - 2**31).tolist()
    above = torch.stack([(each > limit).sum() for each, limit in zip(keys, limits, strict=True)])
    equal = torch.stack([(each == limit).sum() for each, limit in zip(keys, limits, strict=True)])
    by_rank = [torch.empty_like(equal) for _ in range(dist.get_world_size(group))]
    dist.all_gather(by_rank, equal, group=group)
    before = torch.stack([torch.zeros_like(equal), *by_rank[: dist.get_rank(group)]]).sum(0)
    own = above + (left - before).clamp(min=0).minimum(equal)
    return torch.where(wanted > 0, own.cpu(), 0)


def _check_agreement(
    op: str, wanted: Tensor, segments: int, device: torch.device, group: dist.ProcessGroup | None
) -> None:
    """ValueError on every process unless all have as many segments and the same counts."""
    sizes = torch.tensor([segments, -segments, wanted.numel(), -wanted.numel()], device=device)
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
    most, least, most_counts, least_counts = (sizes * sizes.new_tensor([1, -1, 1, -1])).tolist()
    if not most == least == most_counts == least_counts:
        raise ValueError(
            f"{op}: expected as many segments everywhere and one count for each, got {least} to {most} segments and "
            f"{least_counts} to {most_counts} counts"
        )
    both = torch.cat([wanted, -wanted]).to(device)
    dist.all_reduce(both, dist.ReduceOp.MAX, group=group)
    highest, lowest = both[:segments], -both[segments:]
    for segment in (highest != lowest).nonzero().flatten().tolist():
        raise ValueError(
            f"{op}: expected the same counts on every process, got {int(lowest[segment])} to {int(highest[segment])} "
            f"in segment {segment}"
        )


def _check_counts(
    op: str, wanted: Tensor, candidates: list[Tensor], device: torch.device, group: dist.ProcessGroup | None
) -> None:
    """ValueError on every process unless each count is from 0 to the number of eligible units of all processes."""
    available = torch.tensor([each.numel() for each in candidates], device=device)
    dist.all_reduce(available, group=group)
    for segment, (count, most) in enumerate(zip(wanted.tolist(), available.tolist(), strict=True)):
        if not 0 <= count <= most:
            raise ValueError(f"{op}: expected 0 <= counts <= {most} (eligible units) in segment {segment}, got {count}")
