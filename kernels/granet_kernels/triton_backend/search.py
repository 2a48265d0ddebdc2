"""The value of a given rank among integers in registers, in a buffer, or behind scores: by halving an interval."""

import triton
import triton.language as tl

from granet_kernels.triton_backend.keys import (
    BEGIN,
    FIRST_PIECE,
    LEAST_CODE,
    NO_CODE,
    PIECE_WIDTH,
    PIECES,
    SIZE,
    TOP_CODE,
    UNITS_BEGIN,
    codes_of,
    flags_of,
    keys_at,
    scores_of,
)


@triton.jit
def middle_of(low, high):
    """Half of low + high, rounded down, though the sum may overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def narrowed(low, high, middle, count, rank):
    """What is left of [low, high) when `count` values are >= middle: half of it, or middle alone if it is found."""
    reached = count >= rank
    low = tl.where(reached, middle, low)
    high = tl.where(reached, high, middle)
    return low, tl.where(count == rank, middle + 1, high)


@triton.jit
def search_values(values, rank, none: tl.constexpr):
    """A number that exactly `rank` values reach, or the greatest that as many or more reach; not below all. int64.

    Args:
        values: a vector of integers; those that equal `none`, which is below all others, do not count.
        rank: from 1 to the number of values.
    """
    low = tl.min(tl.where(values == none, tl.max(values, 0), values), 0).to(tl.int64)
    high = tl.max(values, 0).to(tl.int64) + 1
    while low + 1 < high:
        middle = middle_of(low, high)
        count = tl.sum((values >= middle.to(values.dtype)).to(tl.int32), 0)
        low, high = narrowed(low, high, middle, count, rank)
    return low


@triton.jit
def search_buffer(codes, count, rank, BLOCK: tl.constexpr):
    """The same among `count` codes in memory.

    They are read anew for each step, a block at a time: few registers matter more here than a few microseconds.
    """
    least = tl.full((BLOCK,), TOP_CODE, tl.int64)
    most = tl.full((BLOCK,), NO_CODE, tl.int64)
    for start in range(0, count, BLOCK):
        found = _codes_from(codes, start, count, BLOCK)
        least = tl.minimum(least, tl.where(found == NO_CODE, TOP_CODE, found))
        most = tl.maximum(most, found)
    low = tl.min(least, 0)  # not below: units whose codes are not here might reach it
    high = tl.max(most, 0) + 1
    while low + 1 < high:
        middle = middle_of(low, high)
        reached = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, count, BLOCK):
            reached += (_codes_from(codes, start, count, BLOCK) >= middle).to(tl.int32)
        low, high = narrowed(low, high, middle, tl.sum(reached.to(tl.int64), 0), rank)
    return low


@triton.jit
def _codes_from(codes, start, count, BLOCK: tl.constexpr):
    """A block of codes, NO_CODE beyond their number. They may come from other programs of this launch."""
    places = start + tl.arange(0, BLOCK)
    return tl.load(codes + places, mask=places < count, other=NO_CODE, cache_modifier=".cg")


@triton.jit
def search_scores(pieces, segment, eligible, rank, BLOCK: tl.constexpr, ABSOLUTE: tl.constexpr, ELIGIBLE: tl.constexpr):
    """The same among the codes of all eligible units of a segment; LEAST_CODE if they are fewer than `rank`."""
    low = tl.full((), LEAST_CODE, tl.int64)
    high = tl.full((), TOP_CODE, tl.int64)
    first = tl.load(segment + FIRST_PIECE)
    units_begin = tl.load(segment + UNITS_BEGIN)
    while low + 1 < high:
        middle = middle_of(low, high)
        reached = tl.zeros((BLOCK,), tl.int64)
        for number in range(first, first + tl.load(segment + PIECES)):
            piece = pieces + number * PIECE_WIDTH
            scores = scores_of(piece, False)
            flags = flags_of(piece, eligible, False, ELIGIBLE)
            begin = tl.load(piece + BEGIN)
            size = tl.load(piece + SIZE)
            for start in range(0, size, BLOCK):
                places = start + tl.arange(0, BLOCK)
                keys = keys_at(scores, flags, places, size, True, ABSOLUTE, ELIGIBLE)
                reached += (codes_of(keys, (begin - units_begin).to(tl.uint32) + places) >= middle).to(tl.int64)
        low, high = narrowed(low, high, middle, tl.sum(reached, 0), rank)
    return low


@triton.jit
def scattered(numbers, count, SAMPLE: tl.constexpr):
    """Of numbers below SAMPLE: rising places below `count`, one in each of SAMPLE equal stretches, hashed; int64."""
    numbers = numbers.to(tl.int64)
    mixed = (numbers * 0x9E3779B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x5BD1E995) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 13)
    return numbers * count // SAMPLE + (mixed * (count // SAMPLE) >> 32)


@triton.jit
def bracket_ranks(rank, count, SAMPLE: tl.constexpr):
    """Between which ranks of a sample the value of `rank` among `count` lies, in all likelihood; int32, from the top.

    They are five standard deviations away from the expected one, and may be below 1 or above SAMPLE.
    """
    expected = rank.to(tl.float32) * (SAMPLE / count.to(tl.float32))
    margin = 5 + 5 * tl.sqrt(tl.maximum(expected * (1 - expected / SAMPLE), 0.0))
    return tl.floor(expected - margin).to(tl.int32), tl.ceil(expected + margin).to(tl.int32)
