"""granet::update_masks on a CUDA device, in at most 12 launches, whatever the number of layers.

    prune   bracket  collect  refine    kept: which units are, how many in each layer
    drop    bracket  collect  refine    mask: which units may be grown
    grow    bracket  collect  refine    write: masks, weights, optimizer state

What is not asked for is left out. Units are numbered in row-major order, which is also the order in memory: a tensor in
another format is copied before, and back if it is changed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from granet_kernels.event import ROUNDING, update_masks_parts
from granet_kernels.triton_backend.selection import (
    BRACKET_WARPS,
    MOST_UNITS,
    WARPS,
    Selection,
    bracket,
    find,
    new_selection,
    write_mask,
)
from granet_kernels.triton_backend.table import Table, table_of
from granet_kernels.triton_backend.update import _drop_bracket_kernel, _kept_kernel, _total_kernel, _write_kernel


@torch.no_grad()
def update_masks_triton(
    masks: Sequence[Tensor],
    weights: Sequence[Tensor],
    growth: Sequence[Tensor],
    states: Sequence[Tensor],
    owners: Sequence[int],
    fills: Sequence[float],
    keep: Sequence[int] | None,
    ratio: float | None,
    round_up: bool,
    can_grow: Sequence[bool],
    keep_regrown: bool,
) -> Tensor:
    """What `update_masks_parts` computes. Nothing waits for the device."""
    bounds = list(accumulate((mask.numel() for mask in masks), initial=0))
    if bounds[-1] == 0:
        return masks[0].new_zeros(len(masks), dtype=torch.int64)
    if bounds[-1] > MOST_UNITS:
        return update_masks_parts(
            masks, weights, growth, states, owners, fills, keep, ratio, round_up, can_grow, keep_regrown
        )
    flags, values, resets = ([part.contiguous() for part in parts] for parts in (masks, weights, states))
    numbers = _numbers_of(len(masks), resets, owners, fills, keep, ratio, round_up, can_grow, device=masks[0].device)
    layers = table_of(values, bounds, flags)
    kept, tile_counts = _prune(layers, values, bounds, flags, numbers.keep)
    grown = free = None
    if ratio is None:
        totals = _totals(layers, tile_counts)
    else:
        totals, amounts, dropped = _drop(layers, kept, tile_counts, numbers, round_up)
        free = torch.empty_like(kept)
        write_mask(dropped, free, inverted=True)
        scores = [part.contiguous() for part in growth]
        grown = new_selection(table_of(scores, bounds), amounts, free, absolute=True, by_piece=False)
        bracket(grown)
        find(grown)
    aligned = all(state.data_ptr() % 16 == 0 for state in resets)
    _write(layers, kept, free, grown, numbers, keep_regrown, aligned)
    for changed, written in zip((*masks, *weights, *states), (*flags, *values, *resets), strict=True):
        if changed is not written:
            changed.copy_(written)
    return totals


@dataclass(frozen=True)
class _Numbers:
    """What the kernels read of the arguments; one tensor in device memory, and views of it.

    Attributes:
        keep: as for the op; None = no pruning.
        can_grow: (layers,), not 0 where a layer takes part in the exchange.
        ratio: the bits of the ratio and of what is added before rounding.
        first_fills, fills: as for the write kernel.
    """

    keep: Tensor | None
    can_grow: Tensor
    ratio: Tensor
    first_fills: Tensor
    fills: Tensor


def _numbers_of(
    layers: int,
    states: Sequence[Tensor],
    owners: Sequence[int],
    fills: Sequence[float],
    keep: Sequence[int] | None,
    ratio: float | None,
    round_up: bool,
    can_grow: Sequence[bool],
    device: torch.device,
) -> _Numbers:
    order = sorted(range(len(states)), key=owners.__getitem__)
    rows = [(states[i].data_ptr(), _bits(fills[i], states[i].dtype), int(states[i].element_size() == 4)) for i in order]
    first = list(accumulate((owners.count(layer) for layer in range(layers)), initial=0))
    slack = -ROUNDING if round_up else ROUNDING
    parts: list[list[int]] = [
        list(keep or ()),
        [int(can) for can in can_grow],
        list(struct.unpack("2q", struct.pack("2d", ratio or 0.0, slack))),
        first,
        [number for row in rows for number in row],
    ]
    padded = [part + [0] * (len(part) % 2) for part in parts]  # so that each begins at a multiple of 16 bytes
    # From memory that is not pinned, a copy that does not block has read everything when it returns.
    flat = torch.tensor([number for part in padded for number in part], dtype=torch.int64, device="cpu")
    split = flat.to(device, non_blocking=True).split([len(part) for part in padded])
    counts, flags, bits, first_fills, rows_ = (each[: len(part)] for each, part in zip(split, parts, strict=True))
    return _Numbers(None if keep is None else counts, flags, bits.view(torch.float64), first_fills, rows_)


def _bits(fill: float, dtype: torch.dtype) -> int:
    return int(
        torch.tensor(fill, dtype=dtype, device="cpu").view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    )


def _prune(
    layers: Table, weights: Sequence[Tensor], bounds: Sequence[int], masks: Sequence[Tensor], keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(units,) uint8, the units kept, and (tiles,) int32, how many of each tile."""
    device = layers.pieces.device
    kept = torch.empty(bounds[-1], dtype=torch.uint8, device=device)
    tile_counts = torch.empty(layers.tile_count, dtype=torch.int32, device=device)
    table, state = layers, kept
    if keep is not None:
        if keep.numel() == 1:
            table = table_of(weights, [bounds[0], bounds[-1]], masks)
        selection = new_selection(table, keep, None, absolute=True, by_piece=True)
        bracket(selection)
        find(selection)
        state = selection.state
    _kept_kernel[(table.tile_count,)](
        table.pieces,
        table.segments,
        state,
        kept,
        tile_counts,
        table.piece_count,
        PRUNE=keep is not None,
        ALIGNED=table.aligned,
        STEPS=table.steps[0],
        BLOCK=table.block,
        BLOCKS=table.blocks,
        num_warps=WARPS,
    )
    return kept, tile_counts


def _totals(layers: Table, tile_counts: Tensor) -> Tensor:
    totals = torch.empty(layers.segment_count, dtype=torch.int64, device=tile_counts.device)
    _total_kernel[(layers.segment_count,)](layers.segments, tile_counts, totals, CHUNK=layers.chunk, num_warps=WARPS)
    return totals


def _drop(
    layers: Table, kept: Tensor, tile_counts: Tensor, numbers: _Numbers, round_up: bool
) -> tuple[Tensor, Tensor, Selection]:
    """(layers,) int64, the units kept and those exchanged; and the selection of the units that are not dropped."""
    count = layers.segment_count
    rows = torch.empty(3, count + count % 2, dtype=torch.int64, device=kept.device)  # each at a multiple of 16 bytes
    totals, left, amounts = (row[:count] for row in rows)
    selection = new_selection(layers, left, kept, absolute=True, by_piece=False)
    _drop_bracket_kernel[(layers.segment_count,)](
        layers.pieces,
        layers.segments,
        tile_counts,
        numbers.can_grow,
        numbers.ratio,
        totals,
        left,
        amounts,
        kept,
        selection.state,
        selection.histograms,
        UP=round_up,
        STEPS=layers.steps[0],
        SAMPLE=layers.sample,
        BINS=layers.bins,
        CHUNK=layers.chunk,
        num_warps=BRACKET_WARPS,
        enable_fp_fusion=False,
    )
    find(selection)
    return totals, amounts, selection


def _write(
    layers: Table,
    kept: Tensor,
    free: Tensor | None,
    grown: Selection | None,
    numbers: _Numbers,
    keep_regrown: bool,
    aligned: bool,
) -> None:
    _write_kernel[(layers.tile_count,)](
        layers.pieces,
        layers.pieces if grown is None else grown.table.pieces,
        kept if grown is None else grown.state,
        kept,
        kept if free is None else free,
        numbers.first_fills,
        numbers.fills,
        layers.piece_count,
        EXCHANGE=grown is not None,
        KEEP_REGROWN=keep_regrown,
        ALIGNED=aligned and layers.aligned and (grown is None or grown.table.aligned),
        STEPS=layers.steps[0],
        BLOCK=layers.block,
        BLOCKS=layers.blocks,
        THREADS=layers.threads,
        num_warps=WARPS,
    )
