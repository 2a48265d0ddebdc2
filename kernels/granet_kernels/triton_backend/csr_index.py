"""CsrIndex: the kept positions of an unstructured mask in the order in which the kernels of `csr` read them.

A line is a row of the mask, or a column for the transposed products. Lines are sorted by how many positions they keep
and dealt out in groups of equal size. Entries lie group by group, in a group step by step, in a step line by line: step
s holds the s-th kept position of each line. So a warp reads the entries of its lines in one piece; and as neighbours in
the order are about equally long, filling up a group to its longest line costs little whatever the lines' lengths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from granet_kernels.layout import layout_of

_LANES, _BLOCK = 8, 256  # lines that a program looks at, and how many of their positions at a time
_UNROLL = 2  # steps come in pairs, and the kernels read one pair ahead
_ROUND = 1024  # entries: the number must not be divisible by 16 for some masks and not for others
_MOST_ENTRIES = 2**31 - 1


@dataclass(frozen=True)
class Lanes:
    """The kept positions of all rows, or of all columns.

    Attributes:
        entries: (capacity,) int32, the kept position within the line; `width` where the line has ended.
        begins: (groups + 1,) int32, the first entry of each group.
        order: (groups * group,) int32, which line each lane holds; `lines` where there is none.
        lines, width: how many lines there are, and how many positions in each.
        group: lines of a group, a power of two.
    """

    entries: Tensor
    begins: Tensor
    order: Tensor
    lines: int
    width: int
    group: int

    @property
    def groups(self) -> int:
        return self.order.numel() // self.group

    @property
    def capacity(self) -> int:
        return self.entries.numel()


@dataclass(frozen=True)
class CsrIndex:
    """A mask (out, in) by rows and by columns. nnz: how many positions are kept."""

    rows: Lanes
    columns: Lanes
    nnz: int


def csr_index(mask: Tensor, group: int | None = None) -> CsrIndex:
    """The index of a mask, kept in its layout until it changes. Nothing waits for the device once the layout is known.

    Args:
        mask: (out, in) bool, any strides.
        group: lines of a group, a power of two from 64 to 256; None = as known, else `group_of` for either direction.
    Raises:
        ValueError: not a matrix, or too large for offsets of 32 bits.
    """
    layout = layout_of(mask)
    known: CsrIndex | None = layout.built.get("csr")
    if known is not None and group in (None, known.rows.group) and group in (None, known.columns.group):
        return known
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"csr_index: expected a bool mask (out, in), got {mask.dtype} {tuple(mask.shape)}")
    rows, columns = (_lanes(each, layout.nnz, group or group_of(each.shape[0])) for each in (mask, mask.t()))
    index = layout.built["csr"] = CsrIndex(rows, columns, layout.nnz)
    return index


def group_of(lines: int) -> int:
    """How many lines share a program: more find more of what they read in the cache, fewer keep more programs busy."""
    return 256 if lines >= 2048 else 128 if lines >= 1024 else 64


def _lanes(mask: Tensor, nnz: int, group: int) -> Lanes:
    lines, width = mask.shape
    groups = triton.cdiv(lines, group)
    # A group is no longer than the shortest line of the one before, so all but the first hold at most nnz together.
    needed = nnz + group * (min(width, nnz) + _UNROLL * (groups + 1))
    capacity = -(-needed // _ROUND) * _ROUND
    if max(capacity, mask.numel(), 64 * (width + 1), 64 * (lines + 1)) > _MOST_ENTRIES:
        raise ValueError(f"csr_index: a mask of shape {tuple(mask.shape)} needs offsets of more than 32 bits")
    counts, order = mask.sum(1, dtype=torch.int32).sort(descending=True, stable=True)
    padded = order.new_full((groups * group,), lines, dtype=torch.int32)
    padded[:lines] = order
    steps = (counts[::group] + (_UNROLL - 1)) // _UNROLL * _UNROLL
    begins = steps.new_zeros(groups + 1)
    begins[1:] = (steps * group).cumsum(0)
    lanes = Lanes(order.new_empty(capacity, dtype=torch.int32), begins, padded, lines, width, group)
    if groups:
        _fill_kernel[(groups * group // _LANES,)](
            mask.contiguous().view(torch.uint8),
            lanes.begins,
            lanes.order,
            lanes.entries,
            lines,
            width,
            LANES=_LANES,
            LINES=group,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return lanes


@triton.jit
def _fill_kernel(
    mask,
    begins,
    order,
    entries,
    lines,
    width,
    LANES: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program LANES lanes of a group: writes the positions that their lines keep, rising, then `width`."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    group = tl.program_id(0) * LANES // LINES
    begin = tl.load(begins + group)
    steps = (tl.load(begins + group + 1) - begin) // LINES
    line = tl.load(order + lane)
    mask += line.to(tl.int64)[:, None] * width
    slots = entries + begin + lane[:, None] % LINES
    seen = tl.zeros((LANES,), tl.int32)
    for start in range(0, width, BLOCK):
        places = start + tl.arange(0, BLOCK)[None, :]
        kept = tl.load(mask + places, mask=(places < width) & (line < lines)[:, None], other=0).to(tl.int32)
        rank = seen[:, None] + tl.cumsum(kept, 1) - 1
        tl.store(slots + rank * LINES, places + tl.zeros_like(rank), mask=kept != 0)
        seen += tl.sum(kept, 1)
    for start in range(tl.min(seen, 0), steps, BLOCK):
        rank = start + tl.arange(0, BLOCK)[None, :]
        ended = (rank >= seen[:, None]) & (rank < steps)
        tl.store(slots + rank * LINES, tl.where(ended, width, 0), mask=ended)
