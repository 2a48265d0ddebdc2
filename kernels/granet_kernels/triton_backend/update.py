"""The kernels of a mask update but for its selections, see `event`.

The units of all layers are numbered through, layer after layer. `kept` says of each whether it is kept after the
pruning, `free` whether it is not kept after the drop: what may be grown.
"""

import triton
import triton.language as tl

from granet_kernels.triton_backend.keys import (
    BY_PIECE,
    FIRST_TILE,
    FLAT,
    PIECE_WIDTH,
    SEGMENT,
    SEGMENT_TILE,
    SEGMENT_WIDTH,
    TILES,
    UNITS_BEGIN,
    codes_of,
    flags_of,
    keys_at,
    row_of,
    scores_of,
)
from granet_kernels.triton_backend.select import bracket, places_of
from granet_kernels.triton_backend.settle import STATE_WIDTH, THRESHOLD, tile_of, total_of

STATE_ADDRESS, FILL, WIDE, FILL_WIDTH = (tl.constexpr(i) for i in range(4))
"""Of a tensor of optimizer state: its address, the bits of its fill, whether an element has 4 bytes or 2."""


@triton.jit
def _kept_kernel(
    pieces,
    segments,
    state,
    kept,
    tile_counts,
    piece_count,
    PRUNE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile: which units of the masks are kept, and how many of the tile; if PRUNE, reach the threshold.

    Args:
        kept: (units,) uint8; tile_counts: (tiles,) int32.
    """
    tile = tl.program_id(0)
    piece = pieces + row_of(pieces, 0, piece_count, tile, PIECE_WIDTH, FIRST_TILE, STEPS) * PIECE_WIDTH
    number = tl.load(piece + SEGMENT)
    weights, masks, begin, size = tile_of(piece, tile, kept, ALIGNED, BLOCK * BLOCKS, BY_PIECE)
    index = (begin - tl.load(segments + number * SEGMENT_WIDTH + UNITS_BEGIN)).to(tl.uint32)
    kept += begin
    threshold = tl.load(state + number * STATE_WIDTH + THRESHOLD) if PRUNE else 0
    total = tl.zeros((BLOCK,), tl.int32)
    for block in range(tl.minimum((size + BLOCK - 1) // BLOCK, BLOCKS)):
        places = block * BLOCK + tl.arange(0, BLOCK)
        if (block + 1) * BLOCK <= size:
            selected = _kept_at(weights, masks, places, size, index, threshold, False, PRUNE)
            tl.store(kept + places, selected.to(tl.uint8))
            total += selected.to(tl.int32)
        else:
            selected = _kept_at(weights, masks, places, size, index, threshold, True, PRUNE)
            tl.store(kept + places, selected.to(tl.uint8), mask=places < size)
            total += selected.to(tl.int32)
    tl.store(tile_counts + tile, tl.sum(total, 0))


@triton.jit
def _kept_at(weights, masks, places, size, index, threshold, MASKED: tl.constexpr, PRUNE: tl.constexpr):
    if PRUNE:
        keys = keys_at(weights, masks, places, size, MASKED, True, BY_PIECE)
        selected = codes_of(keys, index + places) >= threshold
    elif MASKED:
        selected = tl.load(masks + places, mask=places < size, other=0) != 0
    else:
        selected = tl.load(masks + places) != 0
    return selected


@triton.jit
def _total_kernel(segments, tile_counts, totals, CHUNK: tl.constexpr):
    """One program a segment: the sum of the counts of its tiles."""
    number = tl.program_id(0)
    tl.store(totals + number, _total(segments + number * SEGMENT_WIDTH, tile_counts, CHUNK))


@triton.jit
def _total(segment, tile_counts, CHUNK: tl.constexpr):
    return total_of(tile_counts + tl.load(segment + SEGMENT_TILE), tl.load(segment + TILES), CHUNK)


@triton.jit
def exchanged(kept, ratio, slack, UP: tl.constexpr):
    """Of so many units kept, how many to exchange; float64 as in Python if nothing is fused."""
    product = kept.to(tl.float64) * ratio + slack
    if UP:
        rounded = tl.ceil(product)
    else:
        rounded = tl.floor(product)
    return rounded.to(tl.int64)


@triton.jit
def _drop_bracket_kernel(
    pieces,
    segments,
    tile_counts,
    can_grow,
    ratio,
    totals,
    left,
    amounts,
    kept,
    state,
    histograms,
    UP: tl.constexpr,
    STEPS: tl.constexpr,
    SAMPLE: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a layer: how many of its units are kept, how many of them to exchange, and the bracket of the drop.

    Args:
        can_grow: (layers,) int64; ratio: (2,) float64, the ratio and what is added before rounding.
        totals, left, amounts: (layers,) int64, room for the units kept, those left by the drop, and those exchanged.
    """
    number = tl.program_id(0)
    total = _total(segments + number * SEGMENT_WIDTH, tile_counts, CHUNK)
    amount = exchanged(total, tl.load(ratio), tl.load(ratio + 1), UP)
    amount = tl.where(tl.load(can_grow + number) != 0, amount, 0)
    tl.store(totals + number, total)
    tl.store(left + number, total - amount)
    tl.store(amounts + number, amount)
    bracket(pieces, segments, number, total - amount, kept, state, histograms, True, FLAT, STEPS, SAMPLE, BINS)


@triton.jit
def _write_kernel(
    pieces,
    grown_pieces,
    state,
    kept,
    free,
    first_fills,
    fills,
    piece_count,
    EXCHANGE: tl.constexpr,
    KEEP_REGROWN: tl.constexpr,
    ALIGNED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """One program a tile: writes the masks; where a unit does not survive, 0 to the weight and the fills to its state.

    Args:
        pieces: of the weights, with the masks as flags; grown_pieces: of the same units, with their growth.
        state: of the selection by growth.
        first_fills: (layers + 1,) int64, the first row of each layer in `fills`, whose columns are named above.
        EXCHANGE: whether there was one; if not, growth, state and free are not there.
    """
    tile = tl.program_id(0)
    row = row_of(pieces, 0, piece_count, tile, PIECE_WIDTH, FIRST_TILE, STEPS)
    piece = pieces + row * PIECE_WIDTH
    layer = tl.load(piece + SEGMENT)
    weights, flags, begin, size = tile_of(piece, tile, kept, ALIGNED, BLOCK * BLOCKS, FLAT)
    weights = weights.to(tl.pointer_type(tl.int32), bitcast=True)
    start = (tile - tl.load(piece + FIRST_TILE)) * (BLOCK * BLOCKS)
    masks = flags_of(piece, kept, ALIGNED, BY_PIECE) + start
    if EXCHANGE:
        growth = scores_of(grown_pieces + row * PIECE_WIDTH, ALIGNED) + start
        free += begin
        threshold = tl.load(state + layer * STATE_WIDTH + THRESHOLD)
    first_fill = tl.load(first_fills + layer)
    last_fill = tl.load(first_fills + layer + 1)
    for block in range(tl.minimum((size + BLOCK - 1) // BLOCK, BLOCKS)):
        places = block * BLOCK + places_of(BLOCK, THREADS, 4)  # so that all tensors are read and written alike
        inside = places < size
        if (block + 1) * BLOCK <= size:
            survives = tl.load(flags + places) != 0
        else:
            survives = tl.load(flags + places, mask=inside, other=0) != 0
        final = survives
        if EXCHANGE:
            if (block + 1) * BLOCK <= size:
                is_free = tl.load(free + places) != 0
                keys = keys_at(growth, free, places, size, False, True, FLAT)
            else:
                is_free = tl.load(free + places, mask=inside, other=0) != 0
                keys = keys_at(growth, free, places, size, True, True, FLAT)
            final = (codes_of(keys, start.to(tl.uint32) + places) >= threshold) | (is_free == 0)
            if KEEP_REGROWN:
                survives = survives & final
            else:
                survives = is_free == 0
        if (block + 1) * BLOCK <= size:
            tl.store(masks + places, final.to(tl.uint8))
        else:
            tl.store(masks + places, final.to(tl.uint8), mask=inside)
        _fill(weights, places, survives, 0, size, (block + 1) * BLOCK)
        for number in range(first_fill, last_fill):
            fill = fills + number * FILL_WIDTH
            address = tl.load(fill + STATE_ADDRESS)
            bits = tl.load(fill + FILL)
            if tl.load(fill + WIDE) != 0:
                wide = address.to(tl.pointer_type(tl.int32))
                if ALIGNED:
                    wide = tl.multiple_of(wide, 16)
                _fill(wide + start, places, survives, bits.to(tl.int32), size, (block + 1) * BLOCK)
            else:
                narrow = address.to(tl.pointer_type(tl.int16))
                if ALIGNED:
                    narrow = tl.multiple_of(narrow, 16)
                _fill(narrow + start, places, survives, bits.to(tl.int16), size, (block + 1) * BLOCK)


@triton.jit
def _fill(values, places, survives, bits, size, end):
    """Write bits where a unit does not survive, and all others anew: so vectors of 16 bytes are written."""
    if end <= size:
        tl.store(values + places, tl.where(survives, tl.load(values + places), bits))
    else:
        inside = places < size
        tl.store(values + places, bits, mask=inside & (survives == 0))
