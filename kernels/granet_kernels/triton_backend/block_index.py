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
    """

    size: int
    kept: int
    rows: BlockLines
    columns: BlockLines
    _groups: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def groups(self, width: int) -> Tensor:
        """The rows' kept blocks in groups of up to `width`: (groups,) int32, places in `rows.blocks`, flattened.

        A group begins at such a place and ends before the next multiple of `width` in its row, or with the kept
        blocks. A row without any has one empty group. There may be a few entries too many; they are -1.
        """
        groups = self._groups.get(width)
        if groups is None:
            groups = self._groups[width] = _groups_of(self.rows, width, self.kept)
        return groups


def block_index(mask: Tensor) -> BlockIndex | None:
    """The index of the largest blocks of SIZES that a mask (out, in) consists of; None if it is of none of them.

    It is kept until the mask changes. To build it waits once for the device, beside what `layout_of` does.
    """
    layout = layout_of(mask)
    if "blocks" not in layout.built:
        layout.built["blocks"] = _new_index(mask, layout.nnz)
    index: BlockIndex | None = layout.built["blocks"]
    return index


def _new_index(mask: Tensor, nnz: int) -> BlockIndex | None:
    sizes = [size for size in SIZES if not (mask.shape[0] % size or mask.shape[1] % size)]
    if not sizes or not mask.numel():
        return None
    counts = {size: None for size in sizes}
    finest = _sums(mask.view(torch.uint8), sizes[-1])
    counts = {size: finest if size == sizes[-1] else _sums(finest, size // sizes[-1]) for size in sizes}
    whole = [((count == 0) | (count == size * size)).all() for size, count in counts.items()]
    for size, fits in zip(sizes, torch.stack(whole).tolist(), strict=True):
        if fits:
            kept = counts[size] > 0
            return BlockIndex(size, nnz // size**2, _lines(kept), _lines(kept.t()))
    return None


def _sums(values: Tensor, size: int) -> Tensor:
    """(rows * size, columns * size) -> the sums of squares, (rows, columns) int32."""
    return values.unflatten(1, (-1, size)).unflatten(0, (-1, size)).sum((1, 3), dtype=torch.int32)


def _lines(kept: Tensor) -> BlockLines:
    """kept: (lines, across) bool."""
    counts = kept.sum(1, dtype=torch.int32)
    counts, order = torch.sort(counts, descending=True, stable=True)
    blocks = torch.sort(kept[order].logical_not().to(torch.uint8), dim=1, stable=True).indices
    return BlockLines(order.to(torch.int32), counts, blocks.to(torch.int32).contiguous())


def _groups_of(lines: BlockLines, width: int, kept: int) -> Tensor:
    count, across = lines.blocks.shape
    in_line = (lines.counts.long() + width - 1).div_(width, rounding_mode="floor").clamp_(min=1)
    ends = in_line.cumsum(0)
    most = min(count * -(-across // width), kept // width + count)
    numbers = torch.arange(most, device=ends.device)
    line = torch.searchsorted(ends, numbers, right=True).clamp_(max=count - 1)
    places = line * across + (numbers - ends[line] + in_line[line]) * width
    return torch.where(numbers < ends[-1], places, -1).to(torch.int32)
