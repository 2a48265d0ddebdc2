"""The kernels of the exact selection: which units have the counts[s] highest codes of each segment s.

1. `_bracket_kernel`: a sample of each segment's scores gives two keys between which the threshold lies.
2. `_collect_kernel`, one pass over the scores: counts what lies above the bracket and at its two ends, writes the codes
   of what lies inside, a few per cent of all, to a buffer, and counts them by bins of their keys. The program that ends
   last in a segment settles where the threshold is: at one of the ends, or in which bin.
3. `_refine_kernel` finds it. At one of the ends, the units of that key are ranked by number; the codes of a bin, one
   in a thousand of those in the buffer, are written to another buffer and searched.
4. `_mask_kernel`, the other pass over the scores: which units reach the threshold.

Ranks, counts and thresholds stay in device memory. A sample only decides how much work is left: whatever it says, the
counts are exact, and a bracket that has missed the threshold is found out and the scores are searched in full.
"""

import triton
import triton.language as tl

from granet_kernels.triton_backend.keys import (
    ADDRESS,
    BEGIN,
    BIN_BEGIN,
    BIN_CAPACITY,
    BY_PIECE,
    FIRST_PIECE,
    FIRST_TILE,
    FLAGS,
    FLAT,
    INSIDE_BEGIN,
    INSIDE_CAPACITY,
    INSIDE_TILE,
    NO_CODE,
    NO_KEY,
    PIECE_WIDTH,
    PIECES,
    SEGMENT,
    SEGMENT_TILE,
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
    search_scores,
    search_values,
)
from granet_kernels.triton_backend.settle import (
    AT_HIGH,
    AT_LOW,
    COLLECT,
    COUNT,
    DONE,
    FOUND,
    HIGH,
    INPUT,
    LEFT,
    LOW,
    RANK,
    REFINE,
    SEARCH,
    SHIFT,
    STATE_WIDTH,
    STATUS,
    THRESHOLD,
    bins_of,
    nth_of_key,
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
    histograms,
    ABSOLUTE: tl.constexpr,
    ELIGIBLE: tl.constexpr,
    STEPS: tl.constexpr,
    SAMPLE: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program a segment: the keys that bracket the threshold, by a sample; all keys of a small segment."""
    number = tl.program_id(0)
    count = tl.load(counts + number)
    bracket(pieces, segments, number, count, eligible, state, histograms, ABSOLUTE, ELIGIBLE, STEPS, SAMPLE, BINS)


@triton.jit
def bracket(
    pieces,
    segments,
    number,
    count,
    eligible,
    state,
    histograms,
    ABSOLUTE: tl.constexpr,
    ELIGIBLE: tl.constexpr,
    STEPS: tl.constexpr,
    SAMPLE: tl.constexpr,
    BINS: tl.constexpr,
):
    """Begin the selection of `count` units in a segment."""
    segment = segments + number * SEGMENT_WIDTH
    state += number * STATE_WIDTH
    tl.store(histograms + number * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
    units = tl.load(segment + UNITS)
    low = tl.full((), NO_KEY, tl.int64)
    high = tl.full((), TOP_KEY, tl.int64)
    if (units > SAMPLE) & (count > 0):
        unit = tl.load(segment + UNITS_BEGIN) + scattered(tl.arange(0, SAMPLE), units, SAMPLE)
        row = row_of(pieces, tl.load(segment + FIRST_PIECE), tl.load(segment + PIECES), unit, PIECE_WIDTH, BEGIN, STEPS)
        piece = pieces + row * PIECE_WIDTH
        places = tl.load(piece + ADDRESS) + (unit - tl.load(piece + BEGIN)) * 4
        keys = sort_keys(tl.load(places.to(tl.pointer_type(tl.float32))), ABSOLUTE)
        if ELIGIBLE == FLAT:
            keys = tl.where(tl.load(eligible + unit) != 0, keys, NO_KEY)
        if ELIGIBLE == BY_PIECE:
            flags = (tl.load(piece + FLAGS) + unit - tl.load(piece + BEGIN)).to(tl.pointer_type(tl.uint8))
            keys = tl.where(tl.load(flags) != 0, keys, NO_KEY)
        above, below = bracket_ranks(count, units, SAMPLE)
        known = tl.sum((keys != NO_KEY).to(tl.int32), 0)
        if (above >= 1) & (above <= known):
            high = search_values(keys, above, NO_KEY)
        if below <= known:
            low = search_values(keys, below, NO_KEY)
    shift = tl.full((), 0, tl.int64)
    while ((high - low - 2) >> shift) >= BINS:
        shift += 1
    tl.store(state + THRESHOLD, TOP_CODE)
    tl.store(state + STATUS, tl.where((units > 0) & (count > 0), COLLECT, FOUND))
    tl.store(state + LOW, low)
    tl.store(state + HIGH, high)
    tl.store(state + SHIFT, shift)
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
    histograms,
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
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a tile of BLOCKS * BLOCK units of a piece.

    Args:
        tile_counts: (3, tile_count) int32, room for how many units of each tile are above the bracket, at its upper and
            at its lower end.
        histograms: (segments, BINS) int32, zeros.
        codes: int64, the first of the buffers.
    """
    tile = tl.program_id(0)
    piece = pieces + row_of(pieces, 0, piece_count, tile, PIECE_WIDTH, FIRST_TILE, STEPS) * PIECE_WIDTH
    number = tl.load(piece + SEGMENT)
    segment = segments + number * SEGMENT_WIDTH
    state += number * STATE_WIDTH
    histogram = histograms + number * BINS
    if tl.load(state + STATUS) == COLLECT:
        scores, flags, begin, size = tile_of(piece, tile, eligible, ALIGNED, BLOCK * BLOCKS, ELIGIBLE)
        index = (begin - tl.load(segment + UNITS_BEGIN)).to(tl.uint32)
        low = tl.load(state + LOW).to(tl.int32)
        high = tl.load(state + HIGH).to(tl.int32)
        shift = tl.load(state + SHIFT).to(tl.int32)
        output = codes + tl.load(segment + INSIDE_BEGIN)
        capacity = tl.load(segment + INSIDE_CAPACITY)
        low_end = tl.where(low < high, low, TOP_KEY)  # of equal ends, the upper one counts
        outside = tl.zeros((THREADS,), tl.int32)  # above the bracket; in the upper half of the bits, at its upper end
        ends = tl.zeros((THREADS,), tl.int32)  # at its lower end
        for block in range(tl.minimum((size + BLOCK - 1) // BLOCK, BLOCKS)):
            places = block * BLOCK + places_of(BLOCK, THREADS, 4)
            if (block + 1) * BLOCK <= size:
                keys = keys_at(scores, flags, places, size, False, ABSOLUTE, ELIGIBLE)
            else:
                keys = keys_at(scores, flags, places, size, True, ABSOLUTE, ELIGIBLE)
            outside += _by_thread((keys > high).to(tl.int32) + ((keys == high).to(tl.int32) << 16))
            ends += _by_thread((keys == low_end).to(tl.int32))
            inside = (keys > low) & (keys < high)
            tl.atomic_add(histogram + bins_of(keys, low, shift), 1, mask=inside, sem="relaxed")
            _append(output, capacity, state, codes_of(keys, index + places), inside)
        both = tl.sum(outside, 0)
        tl.store(tile_counts + tile, both & 0xFFFF)
        tl.store(tile_counts + tile_count + tile, (both >> 16) & 0xFFFF)
        tl.store(tile_counts + 2 * tile_count + tile, tl.sum(ends, 0))
        if _is_last(state, tl.load(segment + TILES)):
            rank = tl.load(counts + number)
            settle_scores(segment, rank, state, tile_counts, histogram, capacity, tile_count, BINS, CHUNK)


@triton.jit
def _refine_kernel(
    pieces,
    segments,
    eligible,
    state,
    tile_counts,
    input_codes,
    output_codes,
    piece_count,
    segment_count,
    tile_count,
    ABSOLUTE: tl.constexpr,
    ELIGIBLE: tl.constexpr,
    PIECE_STEPS: tl.constexpr,
    SEGMENT_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    THREADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a block of the first buffer: moves the codes of the bin to the other.

    The last one of a segment finds the threshold; where there is no bin, the first one does, by itself.
    """
    tile = tl.program_id(0)
    number = row_of(segments, 0, segment_count, tile, SEGMENT_WIDTH, INSIDE_TILE, SEGMENT_STEPS)
    segment = segments + number * SEGMENT_WIDTH
    state += number * STATE_WIDTH
    start = (tile - tl.load(segment + INSIDE_TILE)) * BLOCK
    status = tl.load(state + STATUS)
    count = tl.load(state + INPUT)
    rank = tl.load(state + RANK)
    if (status == REFINE) & (start < count):
        codes = input_codes + tl.load(segment + INSIDE_BEGIN)
        output = output_codes + tl.load(segment + BIN_BEGIN)
        capacity = tl.load(segment + BIN_CAPACITY)
        places = start + places_of(BLOCK, THREADS, 2)
        found = tl.load(codes + places, mask=places < count, other=NO_CODE)
        _append(output, capacity, state, found, (found >= tl.load(state + LOW)) & (found < tl.load(state + HIGH)))
        if _is_last(state, (count + BLOCK - 1) // BLOCK):
            inside = tl.load(state + COUNT, cache_modifier=".cg")
            fits = inside <= capacity
            where = tl.where(fits, output.to(tl.int64), codes.to(tl.int64)).to(tl.pointer_type(tl.int64))
            size = tl.where(fits, inside, count)
            tl.store(state + THRESHOLD, search_buffer(where, size, tl.where(fits, tl.load(state + LEFT), rank), CHUNK))
    if (start == 0) & ((status == AT_HIGH) | (status == AT_LOW)):
        is_high = status == AT_HIGH
        key = tl.load(state + tl.where(is_high, HIGH, LOW)).to(tl.int32)
        counts = tile_counts + tl.where(is_high, 1, 2) * tile_count + tl.load(segment + SEGMENT_TILE)
        code = nth_of_key(
            pieces,
            segment,
            eligible,
            counts,
            rank,
            key,
            piece_count,
            ABSOLUTE,
            ELIGIBLE,
            PIECE_STEPS,
            BLOCK * BLOCKS,
            CHUNK,
        )
        tl.store(state + THRESHOLD, code)
    if (start == 0) & (status == SEARCH):
        tl.store(state + THRESHOLD, search_scores(pieces, segment, eligible, rank, CHUNK, ABSOLUTE, ELIGIBLE))


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
    INVERTED: tl.constexpr,
):
    """One program a tile: mask = 1 where a unit's code reaches the threshold of its segment, or if INVERTED does not.

    mask: (units,) uint8.
    """
    tile = tl.program_id(0)
    piece = pieces + row_of(pieces, 0, piece_count, tile, PIECE_WIDTH, FIRST_TILE, STEPS) * PIECE_WIDTH
    number = tl.load(piece + SEGMENT)
    scores, flags, begin, size = tile_of(piece, tile, eligible, ALIGNED, BLOCK * BLOCKS, ELIGIBLE)
    index = (begin - tl.load(segments + number * SEGMENT_WIDTH + UNITS_BEGIN)).to(tl.uint32)
    mask += begin
    threshold = tl.load(state + number * STATE_WIDTH + THRESHOLD)
    for block in tl.static_range(BLOCKS):
        places = block * BLOCK + tl.arange(0, BLOCK)
        if (block + 1) * BLOCK <= size:
            keys = keys_at(scores, flags, places, size, False, ABSOLUTE, ELIGIBLE)
            selected = (codes_of(keys, index + places) >= threshold) != INVERTED
            tl.store(mask + places, selected.to(tl.uint8))
        else:
            keys = keys_at(scores, flags, places, size, True, ABSOLUTE, ELIGIBLE)
            selected = (codes_of(keys, index + places) >= threshold) != INVERTED
            tl.store(mask + places, selected.to(tl.uint8), mask=places < size)


@triton.jit
def places_of(BLOCK: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr):
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
