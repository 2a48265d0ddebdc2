"""What the last program of a segment does after a pass: find the threshold, or a narrower bracket of it."""

import triton
import triton.language as tl

from granet_kernels.triton_backend.keys import (
    BEGIN,
    FIRST_TILE,
    LEAST_CODE,
    NO_CODE,
    NO_KEY,
    PIECE_WIDTH,
    SEGMENT_TILE,
    SIZE,
    TILES,
    TOP_CODE,
    UNITS_BEGIN,
    codes_of,
    keys_at,
    row_of,
    scores_of,
)
from granet_kernels.triton_backend.search import (
    bracket_ranks,
    search_buffer,
    search_scores,
)

THRESHOLD, STATUS, LOW, HIGH, RANK, INPUT, COUNT, ABOVE, DONE, STATE_WIDTH = (tl.constexpr(i) for i in range(10))
"""Columns of a segment's state: the code that selected units reach, what comes next, the ends of the bracket (keys for
collect, codes for refine: low <= code < high), the threshold's rank among the codes of the buffer, their number; and
while a pass runs, the codes written, those above the bracket, the tiles done."""

FOUND, COLLECT, REFINE = (tl.constexpr(i) for i in range(3))


@triton.jit
def tile_of(piece, tile, eligible, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """Of a tile of a piece: its scores, its eligible flags, its first unit, and how many units from there on."""
    start = (tile - tl.load(piece + FIRST_TILE)) * TILE
    begin = tl.load(piece + BEGIN)
    if ALIGNED:
        begin = tl.multiple_of(begin, 16)
    return scores_of(piece, ALIGNED) + start, eligible + begin + start, begin + start, tl.load(piece + SIZE) - start


@triton.jit
def settle_scores(
    pieces,
    segment,
    rank,
    eligible,
    state,
    tile_counts,
    codes,
    capacity,
    piece_count,
    tile_count,
    ABSOLUTE: tl.constexpr,
    ELIGIBLE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr,
    LAST: tl.constexpr,
):
    """After the pass over the scores: where the threshold of `rank` is."""
    first = tile_counts + tl.load(segment + SEGMENT_TILE)
    tiles = tl.load(segment + TILES)
    low = tl.load(state + LOW)
    high = tl.load(state + HIGH)
    above = _total(first, tiles, CHUNK)
    from_high = above + _total(first + tile_count, tiles, CHUNK)
    inside = tl.load(state + COUNT, cache_modifier=".cg")
    from_inside = from_high + inside
    from_low = from_inside + _total(first + 2 * tile_count, tiles, CHUNK)
    if (rank > from_high) & (rank <= from_inside) & (inside <= capacity):
        descend(state, codes, inside, rank - from_high, SAMPLE, CHUNK, LAST)
    else:
        is_high = (rank > above) & (rank <= from_high)
        is_low = (rank > from_inside) & (rank <= from_low) & (low > NO_KEY)
        if is_high | is_low:
            key = tl.where(is_high, high, low).to(tl.int32)
            counts = first + tl.where(is_high, 1, 2) * tile_count
            left = rank - tl.where(is_high, above, from_inside)
            found = _nth_of_key(
                pieces,
                segment,
                eligible,
                counts,
                left,
                key,
                piece_count,
                ABSOLUTE,
                ELIGIBLE,
                STEPS,
                BLOCK * BLOCKS,
                CHUNK,
            )
        else:
            found = search_scores(pieces, segment, eligible, rank, CHUNK, ABSOLUTE, ELIGIBLE)
        tl.store(state + THRESHOLD, found)
        tl.store(state + STATUS, FOUND)


@triton.jit
def _nth_of_key(
    pieces,
    segment,
    eligible,
    counts,
    rank,
    key,
    piece_count,
    ABSOLUTE: tl.constexpr,
    ELIGIBLE: tl.constexpr,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The code of the unit that is number `rank`, from 1, of those with this key. counts: of them, by tile of TILE."""
    tiles = tl.load(segment + TILES)
    seen = rank * 0  # units in the tiles so far
    tile = rank * 0  # tiles that end before the unit
    before = rank * 0  # units in those
    for start in range(0, tiles, BLOCK):
        places = start + tl.arange(0, BLOCK)
        found = tl.load(counts + places, mask=places < tiles, other=0, cache_modifier=".cg")
        passed = (places < tiles) & (seen + tl.cumsum(found, 0) < rank)
        tile += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, found, 0), 0)
        seen += tl.sum(found, 0)
    tile += tl.load(segment + SEGMENT_TILE)
    piece = pieces + row_of(pieces, 0, piece_count, tile, PIECE_WIDTH, FIRST_TILE, STEPS) * PIECE_WIDTH
    scores, flags, begin, size = tile_of(piece, tile, eligible, False, TILE)
    index = begin - tl.load(segment + UNITS_BEGIN)
    code = rank * 0 + NO_CODE
    for first in range(0, TILE, BLOCK):
        places = first + tl.arange(0, BLOCK)
        keys = keys_at(scores, flags, places, size, True, ABSOLUTE, ELIGIBLE)
        same = keys == key
        is_it = same & (before + tl.cumsum(same.to(tl.int32), 0) == rank)
        code = tl.maximum(code, tl.max(tl.where(is_it, codes_of(keys, index + places), NO_CODE), 0))
        before += tl.sum(same.to(tl.int32), 0)
    return code


@triton.jit
def descend(state, codes, count, rank, SAMPLE: tl.constexpr, CHUNK: tl.constexpr, LAST: tl.constexpr):
    """The threshold is that of `rank` among `count` codes: find it, or a bracket of it by a sample of them."""
    if LAST or (count <= 2 * SAMPLE):
        tl.store(state + THRESHOLD, search_buffer(codes, count, rank, 0, CHUNK))
        tl.store(state + STATUS, FOUND)
    else:
        above, below = bracket_ranks(rank, count, SAMPLE)
        low = tl.full((), LEAST_CODE, tl.int64)
        high = tl.full((), TOP_CODE, tl.int64)
        if above >= 1:
            high = search_buffer(codes, count, above, SAMPLE, CHUNK)
        if below <= SAMPLE:
            low = search_buffer(codes, count, below, SAMPLE, CHUNK)
        tl.store(state + STATUS, REFINE)
        tl.store(state + LOW, low)
        tl.store(state + HIGH, high)
        tl.store(state + RANK, rank)
        tl.store(state + INPUT, count)
        tl.store(state + COUNT, 0)
        tl.store(state + ABOVE, 0)
        tl.store(state + DONE, 0)


@triton.jit
def _total(counts, size, BLOCK: tl.constexpr):
    """The sum of int32s that other programs have written, int64."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, size, BLOCK):
        places = start + tl.arange(0, BLOCK)
        total += tl.load(counts + places, mask=places < size, other=0, cache_modifier=".cg")
    return tl.sum(total, 0)
