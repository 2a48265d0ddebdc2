"""granet::topk_mask on a CUDA device: exact selection in two passes over the scores, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from granet_kernels.topk import topk_mask_of_parts
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
    codes = [torch.empty(size, dtype=torch.int64, device=device) for size in table.buffers]
    histograms = torch.empty(table.segment_count, table.bins, dtype=torch.int32, device=device)
    eligible = state if flags is None else flags
    modes = {"ABSOLUTE": absolute, "ELIGIBLE": flags is not None}
    tiles = {"BLOCK": table.block, "BLOCKS": table.blocks, "THREADS": table.threads, "CHUNK": table.chunk}
    _bracket_kernel[(table.segment_count,)](
        table.pieces,
        table.segments,
        counts,
        eligible,
        state,
        histograms,
        **modes,
        STEPS=table.steps[0],
        SAMPLE=table.sample,
        BINS=table.bins,
        num_warps=16,
    )
    _collect_kernel[(table.tile_count,)](
        table.pieces,
        table.segments,
        counts,
        eligible,
        state,
        tile_counts,
        histograms,
        codes[0],
        table.piece_count,
        table.tile_count,
        **modes,
        **tiles,
        ALIGNED=table.aligned,
        STEPS=table.steps[0],
        BINS=table.bins,
        num_warps=_WARPS,
        maxnreg=_registers(table, flags is not None),
    )
    _refine_kernel[(table.buffer_tiles,)](
        table.pieces,
        table.segments,
        eligible,
        state,
        tile_counts,
        *codes,
        table.piece_count,
        table.segment_count,
        table.tile_count,
        **modes,
        **tiles,
        PIECE_STEPS=table.steps[0],
        SEGMENT_STEPS=table.steps[1],
        num_warps=_WARPS,
    )
    return state


def _registers(table: Table, eligible: bool) -> int:
    """Of a thread of the collect kernel: what it takes at least; left to itself, ptxas saves a few more and spills."""
    if not table.aligned:
        return 128
    return 96 if eligible else 80
