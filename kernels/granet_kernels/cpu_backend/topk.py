"""granet::topk_mask on a CPU: hands the native library the addresses of the scores, wherever they lie."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from granet_kernels.cpu_backend import library
from granet_kernels.topk import topk_mask_of_parts, topk_mask_op

Stretch = tuple[int, int, int]
"""Scores that lie side by side: the part they are in, where in it they begin, and how many they are."""


@topk_mask_op.register_kernel("cpu")
def topk_mask_cpu(
    scores: Sequence[Tensor], counts: Tensor, offsets: Tensor, eligible: Tensor | None, absolute: bool
) -> Tensor:
    """What `topk_mask_of_parts` computes, without a copy of scores that are contiguous."""
    native = library.load()
    bounds = offsets.tolist()
    if native is None or not _is_for_library(scores, counts, bounds, eligible):
        return topk_mask_of_parts(scores, counts, offsets, eligible, absolute)
    stretches = _stretches([part.numel() for part in scores], bounds)
    if stretches is None:
        scores = [torch.cat([part.reshape(-1) for part in scores])]
        stretches = [(0, begin, end - begin) for begin, end in pairwise(bounds)]
    # These names keep the copies alive, where there are any, while the library reads them.
    parts = [part.contiguous() for part in scores]
    units = None if eligible is None else eligible.contiguous()
    mask = torch.empty(bounds[-1], dtype=torch.bool, device="cpu")
    sizes = [size for _, _, size in stretches]
    begins = list(accumulate(sizes, initial=0))[:-1]
    library.check(
        native.granet_topk_mask(
            len(stretches),
            _pointers([parts[i].data_ptr() + begin * parts[i].element_size() for i, begin, _ in stretches]),
            None if units is None else _pointers([units.data_ptr() + begin for begin in begins]),
            _integers(sizes),
            _integers(counts.tolist()),
            len(bounds) == 2,
            absolute,
            _pointers([mask.data_ptr() + begin for begin in begins]),
            library.threads(),
        )
    )
    return mask


def _is_for_library(scores: Sequence[Tensor], counts: Tensor, bounds: Sequence[int], eligible: Tensor | None) -> bool:
    """Whether the operands fit one another: the library reads and writes wherever they say. Our functions see to it,
    torch.ops.granet.topk_mask takes anything."""
    units = sum(part.numel() for part in scores)
    return (
        all(part.dtype == torch.float32 for part in scores)
        and (eligible is None or (eligible.dtype == torch.bool and eligible.numel() == units))
        and counts.numel() == len(bounds) - 1
        and all(count >= 0 for count in counts.tolist())
        and bounds[0] == 0
        and bounds[-1] == units
        and all(begin <= end for begin, end in pairwise(bounds))
    )


def _stretches(sizes: Sequence[int], bounds: Sequence[int]) -> list[Stretch] | None:
    """The segments as stretches of the parts; one segment may be many. None where one of several crosses parts."""
    if len(bounds) == 2:
        return [(i, 0, size) for i, size in enumerate(sizes)]
    stretches: list[Stretch] = []
    part, first = 0, 0  # the part in which the segment begins, and the units before that part
    for begin, end in pairwise(bounds):
        while part + 1 < len(sizes) and begin >= first + sizes[part]:
            first += sizes[part]
            part += 1
        if end > first + sizes[part]:
            return None
        stretches.append((part, begin - first, end - begin))
    return stretches


def _pointers(addresses: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
