"""Which square blocks of a mask are kept, as the block-sparse kernels read it; built once for each change of a mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from granet_kernels.layout import layout_of

SIZES = (128, 64, 32, 16)


@dataclass(frozen=True)
class BlockLines:
    """The kept blocks of the rows, or of the columns, of blocks. The longest lines come first, so that what is started
    last is short; a buffer has room for all blocks, so that its shape does not change with the mask.

    Attributes:
        order: (lines,) int32, the lines by falling number of kept blocks.
        counts: (lines,) int32, in that order, how many are kept.
        blocks: (lines, across) int32, in that order, where the blocks of a line are: the kept ones, rising, then the
            others, rising.
    """

    order: Tensor
    counts: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class BlockIndex:
    """The kept blocks of a mask (out, in) that consists of whole blocks.

    Attributes:
        size: rows and columns of a block.
        kept: how many blocks are kept.
        rows: of the out / size rows of blocks; columns: of the in / size columns of blocks.
        row_counts: rows.counts in no particular order, on the CPU.
    """

    size: int
    kept: int
    rows: BlockLines
    columns: BlockLines
    row_counts: Tensor
    _groups: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def groups(self, width: int) -> Tensor:
        """The rows' kept blocks in groups of up to `width`: (groups,) int32, places in `rows.blocks`, flattened.

        A group begins at such a place and has `width` blocks, or what is left of the row's kept ones. A row without
        any has one empty group.
        """
        groups = self._groups.get(width)
        if groups is None:
            groups = self._groups[width] = _groups_of(self.rows, self.row_counts, width)
        return groups


def block_index(mask: Tensor) -> BlockIndex | None:
    """The index of the largest blocks of SIZES that a mask (out, in) consists of; None if it is of none of them.

    It is kept until the mask changes. To build it waits once for the device, beside what `layout_of` does.
    """
    built = layout_of(mask).built
    if "blocks" not in built:
        built["blocks"] = _new_index(mask)
    index: BlockIndex | None = built["blocks"]
    return index


def _new_index(mask: Tensor) -> BlockIndex | None:
    sizes = [size for size in SIZES if not (mask.shape[0] % size or mask.shape[1] % size)]
    if not sizes or not mask.numel():
        return None
    finest = _sums(mask.view(torch.uint8), sizes[-1])
    sums = [finest if size == sizes[-1] else _sums(finest, size // sizes[-1]) for size in sizes]
    mixed = [((each > 0) & (each < size * size)).any() for size, each in zip(sizes, sums, strict=True)]
    row_counts = [(each > 0).sum(1, dtype=torch.int32) for each in sums]
    # One copy to the CPU, whichever size it is.
    answer = torch.cat([torch.stack(mixed).int(), *row_counts]).cpu()
    counts_of_sizes = answer[len(sizes) :].split([len(counts) for counts in row_counts])
    for size, each, counts, is_mixed in zip(sizes, sums, counts_of_sizes, answer.tolist(), strict=False):
        if not is_mixed:
            kept = each > 0
            return BlockIndex(size, int(counts.sum()), _lines(kept), _lines(kept.t()), counts.clone())
    return None


def _sums(values: Tensor, size: int) -> Tensor:
    """(rows * size, columns * size) -> the sums of squares, (rows, columns) int32."""
    return values.unflatten(1, (-1, size)).unflatten(0, (-1, size)).sum((1, 3), dtype=torch.int32)


def _lines(kept: Tensor) -> BlockLines:
    """kept: (lines, across) bool."""
    counts, order = torch.sort(kept.sum(1, dtype=torch.int32), descending=True, stable=True)
    blocks = torch.sort(kept[order].logical_not().to(torch.uint8), dim=1, stable=True).indices
    return BlockLines(order.to(torch.int32), counts, blocks.to(torch.int32).contiguous())


def _groups_of(lines: BlockLines, row_counts: Tensor, width: int) -> Tensor:
    total = int(_groups_in(row_counts, width).sum())
    in_line = _groups_in(lines.counts.long(), width)
    ends = in_line.cumsum(0)
    numbers = torch.arange(total, device=ends.device)
    line = torch.searchsorted(ends, numbers, right=True)
    places = line * lines.blocks.shape[1] + (numbers - ends[line] + in_line[line]) * width
    return places.to(torch.int32)


def _groups_in(counts: Tensor, width: int) -> Tensor:
    return torch.div(counts + (width - 1), width, rounding_mode="floor").clamp_(min=1)
