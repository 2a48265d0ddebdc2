"""The kernels of the exact selection: which units have the counts[s] highest codes of each segment s.

1. `_bracket_kernel`: a sample of each segment's scores gives two keys between which the threshold lies.
2. `_collect_kernel`, one pass over the scores: counts what lies above the bracket and at its two ends, and writes the
   codes of what lies inside, a few per cent of all, to a buffer. The program that ends last in a segment settles it:
   the threshold is one of the ends, then the units of that key are ranked by number; or it is inside, and found among
   the codes in the buffer, or first narrowed down by a sample of them.
3. `_refine_kernel`, once for each time that narrowing may be needed, does to the codes what 2 does to the scores.
4. `_mask_kernel`, the other pass over the scores: which units reach the threshold.

Ranks, counts and thresholds stay in device memory. A sample only decides how much work is left: whatever it says, the
counts are exact, and a bracket that has missed the threshold is found out and the scores are searched in full.
"""

import triton
import triton.language as tl

from granet_kernels.triton_backend.keys import (
    ADDRESS,
    BEGIN,
    BUFFER_BEGIN,
    BUFFER_TILE,
    CAPACITY,
    FIRST_PIECE,
    FIRST_TILE,
    NO_CODE,
    NO_KEY,
    PIECE_WIDTH,
    PIECES,
    SEGMENT,
    SEGMENT_WIDTH,
    TILES,
    TOP_CODE,
    TOP_KEY,
    UNITS,
    UNITS_BEGIN,
    codes_of,
    keys_at,
    row_of,
    sort_keys,
)
from granet_kernels.triton_backend.search import (
    bracket_ranks,
    scattered,
    search_buffer,
    search_values,
)
from granet_kernels.triton_backend.settle import (
    ABOVE,
    COLLECT,
    COUNT,
    DONE,
    FOUND,
    HIGH,
    INPUT,
    LOW,
    RANK,
    REFINE,
    STATE_WIDTH,
    STATUS,
    THRESHOLD,
    descend,
    settle_scores,
    tile_of,
)


@triton.jit
def _bracket_kernel(
    pieces,
    segments,
    counts,
    eligible,
    state,
    ABSOLUTE: tl.constexpr,
    ELIGIBLE: tl.constexpr,
    STEPS: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """One program a segment: the keys that bracket the threshold, by a sample; all keys of a small segment."""
    number = tl.program_id(0)
    segment = segments + number * SEGMENT_WIDTH
    state += number * STATE_WIDTH
    units = tl.load(segment + UNITS)
    count = tl.load(counts + number)
    low = tl.full((), NO_KEY, tl.int64)
    high = tl.full((), TOP_KEY, tl.int64)
    if (units > SAMPLE) & (count > 0):
        unit = tl.load(segment + UNITS_BEGIN) + scattered(tl.arange(0, SAMPLE), units, SAMPLE)
        row = row_of(pieces, tl.load(segment + FIRST_PIECE), tl.load(segment + PIECES), unit, PIECE_WIDTH, BEGIN, STEPS)
        piece = pieces + row * PIECE_WIDTH
        places = tl.load(piece + ADDRESS) + (unit - tl.load(piece + BEGIN)) * 4
        keys = sort_keys(tl.load(places.to(tl.pointer_type(tl.float32))), ABSOLUTE)
        if ELIGIBLE:
            keys = tl.where(tl.load(eligible + unit) != 0, keys, NO_KEY)
        above, below = bracket_ranks(count, units, SAMPLE)
        known = tl.sum((keys != NO_KEY).to(tl.int32), 0)
        if (above >= 1) & (above <= known):
            high = search_values(keys, above, NO_KEY)
        if below <= known:
            low = search_values(keys, below, NO_KEY)
    tl.store(state + THRESHOLD, TOP_CODE)
    tl.store(state + STATUS, tl.where((units > 0) & (count > 0), COLLECT, FOUND))
    tl.store(state + LOW, low)
    tl.store(state + HIGH, high)
    tl.store(state + COUNT, 0)
    tl.store(state + DONE, 0)


@triton.jit
def _collect_kernel(
    pieces,
    segments,
    counts,
    eligible,
    state,
    tile_counts,
    codes,
    piece_count,
    tile_count,
    ABSOLUTE: tl.constexpr,
    ELIGIBLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    THREADS: tl.constexpr,
    SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr,
    OUTPUT: tl.constexpr,
    LAST: tl.constexpr,
):
    """One program a tile of BLOCKS * BLOCK units of a piece.

    Args:
        tile_counts: (3, tile_count) int32, room for how many units of each tile are above the bracket, at its upper and
            at its lower end.
        codes: int64, the buffer whose columns in `segments` begin at OUTPUT.
        LAST: whether no refine kernel follows.
    """
    tile = tl.program_id(0)
    piece = pieces + row_of(pieces, 0, piece_count, tile, PIECE_WIDTH, FIRST_TILE, STEPS) * PIECE_WIDTH
    number = tl.load(piece + SEGMENT)
    segment = segments + number * SEGMENT_WIDTH
    state += number * STATE_WIDTH
    if tl.load(state + STATUS) == COLLECT:
        scores, flags, begin, size = tile_of(piece, tile, eligible, ALIGNED, BLOCK * BLOCKS)
        index = begin - tl.load(segment + UNITS_BEGIN)
        low = tl.load(state + LOW).to(tl.int32)
        high = tl.load(state + HIGH).to(tl.int32)
        output = codes + tl.load(segment + OUTPUT + BUFFER_BEGIN)
        capacity = tl.load(segment + OUTPUT + CAPACITY)
        low_end = tl.where(low < high, low, TOP_KEY)  # of equal ends, the upper one counts
        outside = tl.zeros((THREADS,), tl.int32)  # above the bracket; in the upper half of the bits, at its upper end
        ends = tl.zeros((THREADS,), tl.int32)  # at its lower end
        for block in range(BLOCKS):
            places = block * BLOCK + _places(BLOCK, THREADS, 4)
            if (block + 1) * BLOCK <= size:
                keys = keys_at(scores, flags, places, size, False, ABSOLUTE, ELIGIBLE)
            else:
                keys = keys_at(scores, flags, places, size, True, ABSOLUTE, ELIGIBLE)
            outside += _by_thread((keys > high).to(tl.int32) + ((keys == high).to(tl.int32) << 16))
            ends += _by_thread((keys == low_end).to(tl.int32))
            _append(output, capacity, state, codes_of(keys, index + places), (keys > low) & (keys < high))
        both = tl.sum(outside, 0)
        tl.store(tile_counts + tile, both & 0xFFFF)
        tl.store(tile_counts + tile_count + tile, (both >> 16) & 0xFFFF)
        tl.store(tile_counts + 2 * tile_count + tile, tl.sum(ends, 0))
        if _is_last(state, tl.load(segment + TILES)):
            settle_scores(
                pieces,
                segment,
                tl.load(counts + number),
                eligible,
                state,
                tile_counts,
                output,
                capacity,
                piece_count,
                tile_count,
                ABSOLUTE,
                ELIGIBLE,
                STEPS,
                BLOCK,
                BLOCKS,
                SAMPLE,
                CHUNK,
                LAST,
            )


@triton.jit
def _refine_kernel(
    segments,
    state,
    input_codes,
    output_codes,
    segment_count,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    SAMPLE: tl.constexpr,
    CHUNK: tl.constexpr,
    INPUT_COLUMNS: tl.constexpr,
    OUTPUT: tl.constexpr,
    LAST: tl.constexpr,
):
    """One program a block of a buffer: moves what lies in the bracket to the other buffer."""
    tile = tl.program_id(0)
    number = row_of(segments, 0, segment_count, tile, SEGMENT_WIDTH, INPUT_COLUMNS + BUFFER_TILE, STEPS)
    segment = segments + number * SEGMENT_WIDTH
    state += number * STATE_WIDTH
    start = (tile - tl.load(segment + INPUT_COLUMNS + BUFFER_TILE)) * BLOCK
    count = tl.load(state + INPUT)
    if (tl.load(state + STATUS) == REFINE) & (start < count):
        codes = input_codes + tl.load(segment + INPUT_COLUMNS + BUFFER_BEGIN)
        output = output_codes + tl.load(segment + OUTPUT + BUFFER_BEGIN)
        capacity = tl.load(segment + OUTPUT + CAPACITY)
        low = tl.load(state + LOW)
        high = tl.load(state + HIGH)
        places = start + _places(BLOCK, THREADS, 2)
        found = tl.load(codes + places, mask=places < count, other=NO_CODE)
        above = tl.sum(_by_thread((found >= high).to(tl.int32)), 0)
        tl.atomic_add(state + ABOVE, above.to(tl.int64), sem="relaxed")
        _append(output, capacity, state, found, (found >= low) & (found < high))
        if _is_last(state, (count + BLOCK - 1) // BLOCK):
            rank = tl.load(state + RANK)
            left = rank - tl.load(state + ABOVE, cache_modifier=".cg")
            inside = tl.load(state + COUNT, cache_modifier=".cg")
            if (left >= 1) & (left <= inside) & (inside <= capacity):
                descend(state, output, inside, left, SAMPLE, CHUNK, LAST)
            else:
                tl.store(state + THRESHOLD, search_buffer(codes, count, rank, 0, CHUNK))
                tl.store(state + STATUS, FOUND)


@triton.jit
def _mask_kernel(
    pieces,
    segments,
    eligible,
    state,
    mask,
    piece_count,
    ABSOLUTE: tl.constexpr,
    ELIGIBLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile: mask = 1 where a unit's code reaches the threshold of its segment. uint8."""
    tile = tl.program_id(0)
    piece = pieces + row_of(pieces, 0, piece_count, tile, PIECE_WIDTH, FIRST_TILE, STEPS) * PIECE_WIDTH
    number = tl.load(piece + SEGMENT)
    scores, flags, begin, size = tile_of(piece, tile, eligible, ALIGNED, BLOCK * BLOCKS)
    index = begin - tl.load(segments + number * SEGMENT_WIDTH + UNITS_BEGIN)
    mask += begin
    threshold = tl.load(state + number * STATE_WIDTH + THRESHOLD)
    for block in tl.static_range(BLOCKS):
        places = block * BLOCK + tl.arange(0, BLOCK)
        if (block + 1) * BLOCK <= size:
            keys = keys_at(scores, flags, places, size, False, ABSOLUTE, ELIGIBLE)
            tl.store(mask + places, (codes_of(keys, index + places) >= threshold).to(tl.uint8))
        else:
            keys = keys_at(scores, flags, places, size, True, ABSOLUTE, ELIGIBLE)
            selected = codes_of(keys, index + places) >= threshold
            tl.store(mask + places, selected.to(tl.uint8), mask=places < size)


@triton.jit
def _places(BLOCK: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """The numbers below BLOCK as (BLOCK / THREADS / WIDTH, THREADS, WIDTH): each thread has the middle one of its own.

    So it reads vectors of WIDTH values, and sums along the other two dimensions stay within a thread.
    """
    ROUNDS: tl.constexpr = BLOCK // (THREADS * WIDTH)
    vectors = tl.arange(0, ROUNDS)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    return vectors[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _by_thread(values):
    """(rounds, threads, width) -> (threads,): the sum of each thread's values."""
    return tl.sum(tl.sum(values, 2), 0)


@triton.jit
def _append(output, capacity, state, codes, wanted):
    """Write the wanted codes behind those that are there, as far as there is room, and count them all.

    Their order does not matter: those of one thread lie together, so that only one number a thread is scanned.
    """
    flags = wanted.to(tl.int32)
    of_vector = tl.sum(flags, 2)
    of_thread = tl.sum(of_vector, 0)
    before = tl.cumsum(of_thread, 0) - of_thread
    before = before[None, :] + tl.cumsum(of_vector, 0) - of_vector
    place = before[:, :, None] + tl.cumsum(flags, 2) - 1
    first = tl.atomic_add(state + COUNT, tl.sum(of_thread, 0).to(tl.int64), sem="relaxed")
    room = tl.minimum(tl.maximum(capacity - first, 0), TOP_KEY).to(tl.int32)
    tl.store(output + first + place, codes, mask=wanted & (place < room))


@triton.jit
def _is_last(state, tiles):
    """Whether all other programs of the segment are done, so that this one sees all that they have written."""
    tl.debug_barrier()
    done = tl.atomic_add(state + DONE, 1)
    tl.debug_barrier()
    return done == tiles - 1
