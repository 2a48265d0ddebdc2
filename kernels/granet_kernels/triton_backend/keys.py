"""The order of scores as integers, and where units lie in memory: what the kernels of the selection share.

Units are numbered through all scores, and again from 0 within each segment. Scores may lie in several tensors, so that
a segment consists of pieces, stretches of one tensor each. Both are described by tables of int64 in device memory, one
row each, whose columns are named here; `table` writes them.

A key is what reference.sort_keys makes of a score, int32. A code is int64, the key above the complement of the unit's
number within its segment: no two are equal, and of equal keys the lower number has the higher code. To select k units
is to find the code that k of them reach.
"""

import triton
import triton.language as tl

ADDRESS, BEGIN, SIZE, SEGMENT, FIRST_TILE, FLAGS, PIECE_WIDTH = (tl.constexpr(i) for i in range(7))
"""Of a piece: its first score, its first unit, its units, its segment, the number of its first tile, its first flag."""

UNITS_BEGIN, UNITS, FIRST_PIECE, PIECES, SEGMENT_TILE, TILES = (tl.constexpr(i) for i in range(6))
"""Of a segment: its first unit, its units, its first piece, its pieces, the number of its first tile, its tiles."""

INSIDE_BEGIN, INSIDE_CAPACITY, INSIDE_TILE, BIN_BEGIN, BIN_CAPACITY = (tl.constexpr(i) for i in range(6, 11))
"""Of its parts of the two buffers of codes, those inside a bracket and those of one bin: the begin, how many codes it
holds, the number of its first block."""

SEGMENT_WIDTH = tl.constexpr(11)

ALL, FLAT, BY_PIECE = (tl.constexpr(i) for i in range(3))
"""Which units are eligible: all, or those whose flag is not 0, in one buffer or in one for each piece; uint8."""

NO_KEY = tl.constexpr(-(2**31))  # of a unit that is not eligible: below that of every score
TOP_KEY = tl.constexpr(2**31 - 1)  # above that of every score
NO_CODE = tl.constexpr(-(2**63))  # below that of every unit
LEAST_CODE = tl.constexpr((1 - 2**31) * 2**32)  # which every eligible unit reaches
TOP_CODE = tl.constexpr(2**63 - 1)  # which no unit reaches


@triton.jit
def sort_keys(scores, ABSOLUTE: tl.constexpr):
    """reference.sort_keys, of |scores| if ABSOLUTE."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if ABSOLUTE:
        keys = magnitude
    else:
        keys = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > 0x7F800000, 0x7FC00000, keys)


@triton.jit
def codes_of(keys, index):
    """index: uint32, the units' numbers within their segment."""
    return (keys.to(tl.int64) << 32) | (index.to(tl.uint32) ^ 0xFFFFFFFF).to(tl.int64)


@triton.jit
def scores_of(piece, ALIGNED: tl.constexpr):
    """The address of the scores of a piece. ALIGNED: all pieces begin at multiples of 16 bytes."""
    scores = tl.load(piece + ADDRESS).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        scores = tl.multiple_of(scores, 16)
    return scores


@triton.jit
def flags_of(piece, eligible, ALIGNED: tl.constexpr, ELIGIBLE: tl.constexpr):
    """The address of the flags of a piece. eligible: those of all units, if they are FLAT."""
    if ELIGIBLE == BY_PIECE:
        flags = tl.load(piece + FLAGS).to(tl.pointer_type(tl.uint8))
        if ALIGNED:
            flags = tl.multiple_of(flags, 16)
    else:
        begin = tl.load(piece + BEGIN)
        if ALIGNED:
            begin = tl.multiple_of(begin, 16)
        flags = eligible + begin
    return flags


@triton.jit
def keys_at(scores, eligible, places, size, MASKED: tl.constexpr, ABSOLUTE: tl.constexpr, ELIGIBLE: tl.constexpr):
    """The keys at some places of a piece, NO_KEY beyond its size or where a unit is not eligible.

    Args:
        scores, eligible: float32 and uint8, of the first unit of the piece.
        MASKED: whether any place may be beyond the size.
        ELIGIBLE: ALL, or anything else where `eligible` is there.
    """
    inside = places < size
    if MASKED:
        keys = sort_keys(tl.load(scores + places, mask=inside, other=0.0), ABSOLUTE)
        keys = tl.where(inside, keys, NO_KEY)
    else:
        keys = sort_keys(tl.load(scores + places), ABSOLUTE)
    if ELIGIBLE != ALL:
        if MASKED:
            flags = tl.load(eligible + places, mask=inside, other=0)
        else:
            flags = tl.load(eligible + places)
        keys = tl.where(flags != 0, keys, NO_KEY)
    return keys


@triton.jit
def row_of(table, first, count, value, WIDTH: tl.constexpr, COLUMN: tl.constexpr, STEPS: tl.constexpr):
    """The last of `count` rows from `first` whose COLUMN, which rises, is <= value; int32. At most 2^STEPS rows."""
    low = (value * 0 + first).to(tl.int32)
    high = (low + count).to(tl.int32)
    for _ in tl.static_range(STEPS):
        middle = (low + high) >> 1
        reached = tl.load(table + middle * WIDTH + COLUMN) <= value
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low
