"""granet::topk_mask on a CUDA device: exact selection in two passes over the scores, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from granet_kernels.topk import topk_mask_of_parts
from granet_kernels.triton_backend.keys import BUFFERS
from granet_kernels.triton_backend.select import _bracket_kernel, _collect_kernel, _mask_kernel, _refine_kernel
from granet_kernels.triton_backend.settle import STATE_WIDTH
from granet_kernels.triton_backend.table import THREADS, Table, table_of

_WARPS = THREADS // 32
MOST_UNITS = 2**32  # of a segment: a code holds the number of a unit in 32 bits


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
    state = select(table, counts.to(parts[0].device, non_blocking=True), flags, absolute)
    mask = parts[0].new_empty(bounds[-1], dtype=torch.bool)
    _mask_kernel[(table.tile_count,)](
        table.pieces,
        table.segments,
        flags if flags is not None else mask.view(torch.uint8),
        state,
        mask.view(torch.uint8),
        table.piece_count,
        ABSOLUTE=absolute,
        ELIGIBLE=flags is not None,
        ALIGNED=table.aligned,
        STEPS=table.steps[0],
        BLOCK=table.block,
        BLOCKS=table.blocks,
        num_warps=_WARPS,
    )
    return mask


def select(table: Table, counts: Tensor, flags: Tensor | None, absolute: bool) -> Tensor:
    """The state of each segment, (S, STATE_WIDTH) int64, whose first column is the code that selected units reach.

    Args:
        counts: (S,) int64 on the device of the table.
        flags: (units,) uint8, not 0 = eligible; None = all.
    """
    device = table.pieces.device
    state = torch.empty(table.segment_count, STATE_WIDTH.value, dtype=torch.int64, device=device)
    tile_counts = torch.empty(3, table.tile_count, dtype=torch.int32, device=device)
    codes = [torch.empty(size, dtype=torch.int64, device=device) for size, _ in table.buffers]
    eligible = state if flags is None else flags
    modes = {"ABSOLUTE": absolute, "ELIGIBLE": flags is not None, "STEPS": table.steps[0]}
    _bracket_kernel[(table.segment_count,)](
        table.pieces, table.segments, counts, eligible, state, **modes, SAMPLE=table.sample, num_warps=16
    )
    _collect_kernel[(table.tile_count,)](
        table.pieces,
        table.segments,
        counts,
        eligible,
        state,
        tile_counts,
        codes[0],
        table.piece_count,
        table.tile_count,
        **modes,
        ALIGNED=table.aligned,
        BLOCK=table.block,
        BLOCKS=table.blocks,
        THREADS=table.threads,
        SAMPLE=table.codes,
        CHUNK=table.chunk,
        OUTPUT=BUFFERS[0],
        LAST=table.refinements == 0,
        num_warps=_WARPS,
    )
    for number in range(table.refinements):
        source, target = number % 2, 1 - number % 2
        _refine_kernel[(table.buffers[source][1],)](
            table.segments,
            state,
            codes[source],
            codes[target],
            table.segment_count,
            STEPS=table.steps[1],
            BLOCK=table.block,
            THREADS=table.threads,
            SAMPLE=table.codes,
            CHUNK=table.chunk,
            INPUT_COLUMNS=BUFFERS[source],
            OUTPUT=BUFFERS[target],
            LAST=number + 1 == table.refinements,
            num_warps=_WARPS,
        )
    return state
