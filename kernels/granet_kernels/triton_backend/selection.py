"""The launches of one selection, in their order. Nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from granet_kernels.triton_backend.keys import ALL, BY_PIECE, FLAT
from granet_kernels.triton_backend.select import _bracket_kernel, _collect_kernel, _mask_kernel, _refine_kernel
from granet_kernels.triton_backend.settle import STATE_WIDTH
from granet_kernels.triton_backend.table import THREADS, Table

WARPS = THREADS // 32
BRACKET_WARPS = 16
MOST_UNITS = 2**32  # of a segment: a code holds the number of a unit in 32 bits


@dataclass(frozen=True)
class Selection:
    """Which units are selected, and room for what the kernels find out about that.

    Attributes:
        table: of the scores.
        eligible: (units,) uint8, not 0 = eligible; anything where all are, or where the table knows the flags.
        counts: (segments,) int64, how many to select.
        state: (segments, STATE_WIDTH) int64, whose first column becomes the code that selected units reach.
        histograms: (segments, bins) int32.
        modes: of the kernels, what is known when they are compiled.
    """

    table: Table
    eligible: Tensor
    counts: Tensor
    state: Tensor
    histograms: Tensor
    modes: dict[str, Any]


def new_selection(table: Table, counts: Tensor, flags: Tensor | None, absolute: bool, by_piece: bool) -> Selection:
    """flags: (units,) uint8, or None: all units are eligible, or if by_piece those whose flags the table knows."""
    device = table.pieces.device
    state = torch.empty(table.segment_count, STATE_WIDTH.value, dtype=torch.int64, device=device)
    eligible = BY_PIECE if by_piece else ALL if flags is None else FLAT
    return Selection(
        table,
        state if flags is None else flags,
        counts,
        state,
        torch.empty(table.segment_count, table.bins, dtype=torch.int32, device=device),
        {"ABSOLUTE": absolute, "ELIGIBLE": eligible.value},
    )


def bracket(selection: Selection) -> None:
    table = selection.table
    _bracket_kernel[(table.segment_count,)](
        table.pieces,
        table.segments,
        selection.counts,
        selection.eligible,
        selection.state,
        selection.histograms,
        **selection.modes,
        STEPS=table.steps[0],
        SAMPLE=table.sample,
        BINS=table.bins,
        num_warps=BRACKET_WARPS,
    )


def find(selection: Selection) -> None:
    """The thresholds, from their brackets."""
    table = selection.table
    device = table.pieces.device
    tile_counts = torch.empty(3, table.tile_count, dtype=torch.int32, device=device)
    codes = [torch.empty(size, dtype=torch.int64, device=device) for size in table.buffers]
    tiles = {"BLOCK": table.block, "BLOCKS": table.blocks, "THREADS": table.threads, "CHUNK": table.chunk}
    _collect_kernel[(table.tile_count,)](
        table.pieces,
        table.segments,
        selection.counts,
        selection.eligible,
        selection.state,
        tile_counts,
        selection.histograms,
        codes[0],
        table.piece_count,
        table.tile_count,
        **selection.modes,
        **tiles,
        ALIGNED=table.aligned,
        STEPS=table.steps[0],
        BINS=table.bins,
        num_warps=WARPS,
        maxnreg=_registers(selection),
    )
    _refine_kernel[(table.buffer_tiles,)](
        table.pieces,
        table.segments,
        selection.eligible,
        selection.state,
        tile_counts,
        *codes,
        table.piece_count,
        table.segment_count,
        table.tile_count,
        **selection.modes,
        **tiles,
        PIECE_STEPS=table.steps[0],
        SEGMENT_STEPS=table.steps[1],
        num_warps=WARPS,
    )


def write_mask(selection: Selection, mask: Tensor, *, inverted: bool = False) -> None:
    """mask: (units,) uint8, becomes 1 for the selected units, or if inverted for all others."""
    table = selection.table
    _mask_kernel[(table.tile_count,)](
        table.pieces,
        table.segments,
        selection.eligible,
        selection.state,
        mask,
        table.piece_count,
        **selection.modes,
        INVERTED=inverted,
        ALIGNED=table.aligned,
        STEPS=table.steps[0],
        BLOCK=table.block,
        BLOCKS=table.blocks,
        num_warps=WARPS,
    )


def _registers(selection: Selection) -> int:
    """Of a thread of the collect kernel: what it takes at least; left to itself, ptxas saves a few more and spills."""
    if not selection.table.aligned:
        return 128
    return 80 if selection.modes["ELIGIBLE"] == ALL.value else 96
