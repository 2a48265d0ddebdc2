"""granet::topk_mask on a CUDA device: exact selection in two passes over the scores, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from granet_kernels.topk import topk_mask_of_parts
from granet_kernels.triton_backend.selection import MOST_UNITS, bracket, find, new_selection, write_mask
from granet_kernels.triton_backend.table import table_of


def topk_mask_triton(
    scores: Sequence[Tensor], counts: Tensor, offsets: Tensor, eligible: Tensor | None, absolute: bool
) -> Tensor:
    """What `topk_mask_of_parts` computes.

    Nothing waits for the device. With counts in its memory, and scores and offsets as in a call before, nothing is
    copied to it either, so that the call can be captured in a graph. A count above the number of eligible units selects
    them all, one below 0 none.

    Args:
        counts: (S,) int64 on any device; offsets: (S+1,) int64 on the CPU. The rest as for the op.
    """
    bounds = offsets.tolist()
    if not bounds[-1]:
        return scores[0].new_empty(0, dtype=torch.bool)
    if max(end - begin for begin, end in pairwise(bounds)) > MOST_UNITS:
        return topk_mask_of_parts(scores, counts, offsets, eligible, absolute)
    parts = [part.contiguous() for part in scores]
    table = table_of(parts, bounds)
    flags = None if eligible is None else eligible.contiguous().view(torch.uint8)
    on_device = counts.to(parts[0].device, non_blocking=True)
    selection = new_selection(table, on_device, flags, absolute, by_piece=False)
    bracket(selection)
    find(selection)
    mask = parts[0].new_empty(bounds[-1], dtype=torch.bool)
    write_mask(selection, mask.view(torch.uint8))
    return mask
