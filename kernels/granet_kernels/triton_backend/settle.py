"""Where the threshold of a segment is: what its last program finds out after a pass, and the rare ways to it."""

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
    UNITS_BEGIN,
    codes_of,
    flags_of,
    keys_at,
    row_of,
    scores_of,
)

THRESHOLD, STATUS, LOW, HIGH, SHIFT, RANK, LEFT, INPUT, COUNT, DONE, STATE_WIDTH = (tl.constexpr(i) for i in range(11))
"""Columns of a segment's state: the code that selected units reach, what comes next, the ends of the bracket (keys for
collect, neither of them inside; codes for refine: low <= code < high), the bits of a key below the number of its bin;
the threshold's rank among the codes of the buffer (or among the units of a key, or all units), its rank among those in
the bracket, the codes in the buffer; and while a pass runs, the codes written and the tiles done."""

FOUND, COLLECT, REFINE, AT_HIGH, AT_LOW, SEARCH = (tl.constexpr(i) for i in range(6))
"""The threshold is found; to be bracketed; inside the bracket; at its upper or lower end; none of these."""


@triton.jit
def tile_of(piece, tile, eligible, ALIGNED: tl.constexpr, TILE: tl.constexpr, ELIGIBLE: tl.constexpr):
    """Of a tile of a piece: its scores, its eligible flags, its first unit, and how many units from there on."""
    start = (tile - tl.load(piece + FIRST_TILE)) * TILE
    begin = tl.load(piece + BEGIN)
    if ALIGNED:
        begin = tl.multiple_of(begin, 16)
    flags = flags_of(piece, eligible, ALIGNED, ELIGIBLE)
    return scores_of(piece, ALIGNED) + start, flags + start, begin + start, tl.load(piece + SIZE) - start


@triton.jit
def bins_of(keys, low, shift):
    """The bins of keys above `low`; int32."""
    return ((keys - (low + 1)).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def settle_scores(
    segment, rank, state, tile_counts, histogram, capacity, tile_count, BINS: tl.constexpr, CHUNK: tl.constexpr
):
    """After the pass over the scores: where the threshold of `rank` is, and if it is in the bracket, in which bin."""
    first = tile_counts + tl.load(segment + SEGMENT_TILE)
    tiles = tl.load(segment + TILES)
    above = total_of(first, tiles, CHUNK)
    from_high = above + total_of(first + tile_count, tiles, CHUNK)
    inside = tl.load(state + COUNT, cache_modifier=".cg")
    from_inside = from_high + inside
    from_low = from_inside + total_of(first + 2 * tile_count, tiles, CHUNK)
    low = tl.load(state + LOW)
    is_high = (rank > above) & (rank <= from_high)
    is_low = (rank > from_inside) & (rank <= from_low)
    if (rank > from_high) & (rank <= from_inside) & (inside <= capacity):
        _narrow(state, histogram, inside, rank - from_high, BINS)
    elif (rank > from_inside) & (low == NO_KEY):  # so many are not eligible
        tl.store(state + STATUS, FOUND)
        tl.store(state + THRESHOLD, LEAST_CODE)
    else:
        tl.store(state + STATUS, tl.where(is_high, AT_HIGH, tl.where(is_low, AT_LOW, SEARCH)))
        tl.store(state + RANK, rank - tl.where(is_high, above, tl.where(is_low, from_inside, 0)))


@triton.jit
def _narrow(state, histogram, inside, rank, BINS: tl.constexpr):
    """The bracket becomes the bin in which the code of `rank` is."""
    counts = tl.load(histogram + tl.arange(0, BINS), cache_modifier=".cg")
    upto = tl.cumsum(counts, 0)
    from_below = (inside - rank + 1).to(tl.int32)
    number = tl.sum((upto < from_below).to(tl.int32), 0).to(tl.int64)
    above = tl.sum(tl.where(upto - counts >= from_below, counts, 0), 0)
    shift = tl.load(state + SHIFT)
    low = tl.load(state + LOW) + 1 + (number << shift)
    tl.store(state + STATUS, REFINE)
    tl.store(state + LOW, low << 32)
    tl.store(state + HIGH, tl.minimum(low + (tl.full((), 1, tl.int64) << shift), tl.load(state + HIGH)) << 32)
    tl.store(state + RANK, rank)
    tl.store(state + LEFT, rank - above)
    tl.store(state + INPUT, inside)
    tl.store(state + COUNT, 0)
    tl.store(state + DONE, 0)


@triton.jit
def nth_of_key(
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
    scores, flags, begin, size = tile_of(piece, tile, eligible, False, TILE, ELIGIBLE)
    index = (begin - tl.load(segment + UNITS_BEGIN)).to(tl.uint32)
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
def total_of(counts, size, BLOCK: tl.constexpr):
    """The sum of int32s that other programs have written, int64."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, size, BLOCK):
        places = start + tl.arange(0, BLOCK)
        total += tl.load(counts + places, mask=places < size, other=0, cache_modifier=".cg")
    return tl.sum(total, 0)
