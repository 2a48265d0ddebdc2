"""The tables by which the kernels of the selection find scores, segments and buffers; kept for the next call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

BLOCK = 2048  # units that a program works on at once; a tile has up to 2^15
THREADS = 256  # of a program
SAMPLE = 8192  # scores of a segment that are looked at first
BINS = 2048  # that the codes inside a bracket are counted by
CHUNK = 1024  # codes, or counts, that a program takes at a time when it settles a segment
LARGE = 2**24  # units, from which on a program takes several blocks, one after the other
_MOST_TABLES = 64


@dataclass(frozen=True, eq=False)  # two of the same content are two buffers
class Table:
    """One selection as the kernels see it.

    Attributes:
        pieces, segments: int64 on the device of the scores; columns as in `keys`.
        piece_count, segment_count, tile_count: rows of the tables, and programs of a pass over the scores.
        block, threads, sample, bins, chunk: as BLOCK, THREADS, SAMPLE, BINS, CHUNK.
        blocks: how many times `block` units are in a tile.
        buffers: how many codes each of the two holds.
        buffer_tiles: programs of a pass over the first.
        aligned: whether vectors of 16 bytes can be read and written.
        steps: of a binary search over the pieces, and over the segments.
    """

    pieces: Tensor
    segments: Tensor
    piece_count: int
    segment_count: int
    tile_count: int
    block: int
    threads: int
    sample: int
    bins: int
    chunk: int
    blocks: int
    buffers: tuple[int, int]
    buffer_tiles: int
    aligned: bool
    steps: tuple[int, int]


Piece = tuple[int, int, int, int, int]
"""Address of the scores, first unit, units, segment, address of the flags."""

_tables: dict[tuple[object, ...], Table] = {}
_captured: list[Table] = []  # which graphs read at every replay


def table_of(parts: Sequence[Tensor], bounds: Sequence[int], flags: Sequence[Tensor] = ()) -> Table:
    """The table of contiguous float32 parts, and contiguous flags of 1 byte for each, cut into segments at `bounds`.

    A table depends on addresses and sizes alone. It is kept, so that a captured graph, or a step like the last one,
    copies nothing to the device.
    """
    device = parts[0].device
    addresses = [(part.data_ptr(), part.numel()) for part in parts]
    flag_addresses = [part.data_ptr() for part in flags]
    key = (device, *addresses, tuple(bounds), *flag_addresses)
    table = _tables.get(key)
    if table is None:
        while len(_tables) >= _MOST_TABLES:
            _tables.pop(next(iter(_tables)), None)
        table = _tables[key] = _new_table(_pieces(addresses, bounds, flag_addresses), bounds, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing() and table not in _captured:
        _captured.append(table)
    return table


def _pieces(parts: Sequence[tuple[int, int]], bounds: Sequence[int], flags: Sequence[int]) -> list[Piece]:
    """Where the parts and the segments overlap, in the order of the units."""
    starts = list(accumulate((units for _, units in parts), initial=0))
    pieces: list[Piece] = []
    part = 0
    for segment, (begin, end) in enumerate(pairwise(bounds)):
        at = begin
        while at < end:
            while starts[part + 1] <= at:
                part += 1
            upto = min(end, starts[part + 1])
            skipped = at - starts[part]
            flag = flags[part] + skipped if flags else 0
            pieces.append((parts[part][0] + 4 * skipped, at, upto - at, segment, flag))
            at = upto
    return pieces


def _new_table(pieces: Sequence[Piece], bounds: Sequence[int], device: torch.device) -> Table:
    blocks = 16 if bounds[-1] > LARGE else 1
    first_tiles = list(accumulate((-(-size // (BLOCK * blocks)) for _, _, size, _, _ in pieces), initial=0))
    piece_rows = [(*piece[:4], first, piece[4]) for piece, first in zip(pieces, first_tiles, strict=False)]
    sizes = [end - begin for begin, end in pairwise(bounds)]
    of_segment = [0] * (len(sizes) + 1)
    for _, _, _, segment, _ in pieces:
        of_segment[segment + 1] += 1
    first_pieces = list(accumulate(of_segment))
    scores = [
        (begin, size, first, last - first, first_tiles[first], first_tiles[last] - first_tiles[first])
        for begin, size, (first, last) in zip(bounds, sizes, pairwise(first_pieces), strict=False)
    ]
    inside, of_bin = zip(*(_capacities(size) for size in sizes), strict=True)
    begins, bin_begins = (list(accumulate(capacities, initial=0)) for capacities in (inside, of_bin))
    tiles = list(accumulate((-(-capacity // BLOCK) for capacity in inside), initial=0))
    parts = zip(begins, inside, tiles, bin_begins, of_bin, strict=False)
    segment_rows = [(*row, *part) for row, part in zip(scores, parts, strict=True)]
    return Table(
        pieces=torch.tensor(piece_rows, dtype=torch.int64, device="cpu").reshape(-1, 6).to(device, non_blocking=True),
        segments=torch.tensor(segment_rows, dtype=torch.int64, device="cpu")
        .reshape(-1, 11)
        .to(device, non_blocking=True),
        piece_count=len(pieces),
        segment_count=len(sizes),
        tile_count=first_tiles[-1],
        block=BLOCK,
        threads=THREADS,
        sample=SAMPLE,
        bins=BINS,
        chunk=CHUNK,
        blocks=blocks,
        buffers=(begins[-1], bin_begins[-1]),
        buffer_tiles=tiles[-1],
        aligned=all(address % 16 == begin % 16 == flag % 16 == 0 for address, begin, _, _, flag in pieces),
        steps=(len(pieces).bit_length(), len(sizes).bit_length()),
    )


def _capacities(units: int) -> tuple[int, int]:
    """How many codes may lie within the bracket of a sample of so many units, but for bad luck; and in one of its bins.

    Beyond that nothing goes wrong, but a single program has to search what there was no room for.
    """
    share = min(1.0, 2 * (5 + 2.5 * math.sqrt(SAMPLE)) / SAMPLE)  # see `search.bracket_ranks`
    inside = min(units, math.ceil(1.3 * share * units) + SAMPLE)
    return inside, min(inside, inside // 16 + SAMPLE)
