"""Products with a matrix that keeps few of its positions, on panels of activations (`panels`) by lanes (`csr_index`).

A program walks the steps of one group of lines over one panel. As positions rise along a line, its lines read the same
few hundred rows of the panel at any time, which the L1 cache holds; a barrier in each round keeps its warps together.
"""

import triton
import triton.language as tl

FLOAT32, BFLOAT16, FLOAT16 = (tl.constexpr(i) for i in range(3))
"""What a word of 4 bytes holds: one value, or two."""


@triton.jit
def _pack_kernel(
    weight,
    entries,
    begins,
    order,
    pairs,
    width,
    stride_line,
    stride_entry,
    PANEL: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """CHUNKS programs a group: pairs = the word in a panel where the entry's row begins, below the weight's bits."""
    group = tl.program_id(0) // CHUNKS
    begin = tl.load(begins + group)
    size = tl.load(begins + group + 1) - begin
    for start in range(tl.program_id(0) % CHUNKS * BLOCK, size, CHUNKS * BLOCK):
        slot = start + tl.arange(0, BLOCK)
        entry = tl.load(entries + begin + slot, mask=slot < size, other=width)
        line = tl.load(order + group * LINES + slot % LINES).to(tl.int64)
        place = line * stride_line + entry.to(tl.int64) * stride_entry
        value = tl.load(weight + place, mask=entry < width, other=0.0).to(tl.float32)
        bits = value.to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(pairs + begin + slot, bits | (entry * PANEL).to(tl.int64), mask=slot < size)


@triton.jit
def _product_kernel(
    pairs,
    begins,
    order,
    x_panels,
    y_panels,
    bias,
    groups,
    x_rows,
    y_rows,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    LINES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program a group and panel: y[line] = sum over its pairs of value * x[row], + bias[line] if BIAS."""
    PANEL: tl.constexpr = PARTS * PART
    group = tl.program_id(0) % groups
    panel = (tl.program_id(0) // groups).to(tl.int64)
    begin = tl.load(begins + group)
    steps = (tl.load(begins + group + 1) - begin) // LINES
    line = tl.arange(0, LINES)
    words = _row_words(LINES, PARTS, PART)
    x = x_panels + panel * x_rows * PANEL
    low = tl.zeros((LINES, PARTS, PART), tl.float32)
    high = tl.zeros((LINES, PARTS, PART), tl.float32)
    pairs += begin + line
    first = tl.load(pairs)
    if UNROLL == 2:
        second = tl.load(pairs + LINES)
        for _ in range(0, steps, 2):
            row = _gathered(x, words, first, PANEL, PART)
            next_row = _gathered(x, words, second, PANEL, PART)
            pairs += 2 * LINES
            later = tl.load(pairs)
            next_later = tl.load(pairs + LINES)
            tl.debug_barrier()
            low, high = _add_product(low, high, row, first, KIND)
            low, high = _add_product(low, high, next_row, second, KIND)
            first = later
            second = next_later
    else:
        for _ in range(0, steps, 2):
            row = _gathered(x, words, first, PANEL, PART)
            second = tl.load(pairs + LINES)
            tl.debug_barrier()
            low, high = _add_product(low, high, row, first, KIND)
            row = _gathered(x, words, second, PANEL, PART)
            pairs += 2 * LINES
            first = tl.load(pairs)
            tl.debug_barrier()
            low, high = _add_product(low, high, row, second, KIND)
    number = tl.load(order + group * LINES + line)
    inside = number < y_rows
    if BIAS:
        shift = tl.load(bias + number, mask=inside, other=0.0).to(tl.float32)[:, None, None]
        low += shift
        high += shift
    y = y_panels + panel * y_rows * PANEL + (tl.multiple_of(number * PANEL, PANEL)[:, None, None] + words)
    tl.store(y, _words_of(low, high, KIND), mask=inside[:, None, None])


@triton.jit(do_not_specialize=["splits"])
def _sampled_kernel(
    entries,
    begins,
    order,
    grad_panels,
    x_panels,
    partial,
    groups,
    grad_rows,
    x_rows,
    panels,
    splits,
    capacity,
    KIND: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    LINES: tl.constexpr,
):
    """One program a group and share of the panels: partial[split, slot] = grad[line] . x[entry] over that share.

    The lines' own rows stay in registers for a panel; the sums go through memory from one panel to the next.
    """
    PANEL: tl.constexpr = PARTS * PART
    group = tl.program_id(0) % groups
    split = tl.program_id(0) // groups
    begin = tl.load(begins + group)
    steps = (tl.load(begins + group + 1) - begin) // LINES
    line = tl.arange(0, LINES)
    words = _row_words(LINES, PARTS, PART)
    own = tl.load(order + group * LINES + line) * PANEL
    entries += begin + line
    partial += split.to(tl.int64) * capacity + begin + line
    first_panel = split * panels // splits
    grad_panels += first_panel.to(tl.int64) * grad_rows * PANEL
    x_panels += first_panel.to(tl.int64) * x_rows * PANEL
    for panel in range(first_panel, (split + 1) * panels // splits):
        grad = _gathered(grad_panels, words, own, PANEL, PART)
        resumed = (line >= 0) & (panel > first_panel)
        sums = partial
        ahead = entries
        entry = tl.load(ahead)
        for _ in range(steps):
            row = _gathered(x_panels, words, entry * PANEL, PANEL, PART)
            total = tl.load(sums, mask=resumed, other=0.0)
            ahead += LINES
            entry = tl.load(ahead)
            tl.store(sums, total + _dots(grad, row, KIND))
            sums += LINES
        grad_panels += grad_rows * PANEL
        x_panels += x_rows * PANEL
        tl.debug_barrier()  # one thread of several has written a sum that all of them read


@triton.jit(do_not_specialize=["splits"])
def _scatter_kernel(
    partial,
    entries,
    begins,
    order,
    w_grad,
    width,
    splits,
    capacity,
    stride_line,
    stride_entry,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """CHUNKS programs a group: w_grad[line, entry] = the sum of its partial sums, in the order of the shares."""
    group = tl.program_id(0) // CHUNKS
    begin = tl.load(begins + group)
    size = tl.load(begins + group + 1) - begin
    for start in range(tl.program_id(0) % CHUNKS * BLOCK, size, CHUNKS * BLOCK):
        slot = start + tl.arange(0, BLOCK)
        entry = tl.load(entries + begin + slot, mask=slot < size, other=width)
        total = tl.zeros((BLOCK,), tl.float32)
        share = partial + begin
        for _ in range(splits):
            total += tl.load(share + slot, mask=entry < width, other=0.0)
            share += capacity
        line = tl.load(order + group * LINES + slot % LINES).to(tl.int64)
        place = line * stride_line + entry.to(tl.int64) * stride_entry
        tl.store(w_grad + place, total.to(w_grad.dtype.element_ty), mask=entry < width)


@triton.jit
def _row_words(LINES: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr):
    """Which words of a row each place of a tile (lines, parts, part) holds.

    Where a part is half a cache line, lines that are loaded together begin with different halves: they would meet in
    the same banks otherwise.
    """
    part = tl.arange(0, PARTS)[None, :, None]
    if PART < 32:
        part = part ^ (tl.arange(0, LINES)[:, None, None] & 1)
    return part * PART + tl.arange(0, PART)[None, None, :]


@triton.jit
def _gathered(panel, words, offsets, PANEL: tl.constexpr, PART: tl.constexpr):
    """For each line a row of the panel: the tile (lines, parts, part).

    Args:
        offsets: (lines,) int64 whose lower halves are multiples of PANEL, or int32 that are products with PANEL: the
            hint that makes loads wide is lost on a value that is not computed here.
    """
    rows = tl.multiple_of(offsets.to(tl.int32), PANEL)[:, None, None]
    if PART < 32:  # the parts' addresses differ by line: one addition for each, in 32 bits
        found = tl.load(panel + (rows + words))
    else:  # they differ by constants, which loads add themselves
        found = tl.load((panel + words) + rows)
    return found


@triton.jit
def _add_product(low, high, row, pairs, KIND: tl.constexpr):
    """low, and high where a word holds two values, plus row * the value of each line's pair."""
    values = (pairs >> 32).to(tl.int32).to(tl.float32, bitcast=True)[:, None, None]
    low = tl.fma(_low_values(row, KIND), values, low)
    if KIND != FLOAT32:
        high = tl.fma(_high_values(row, KIND), values, high)
    return low, high


@triton.jit
def _dots(grad, row, KIND: tl.constexpr):
    """(lines,): the dot product of each line's words with its row, over this panel."""
    products = _low_values(grad, KIND) * _low_values(row, KIND)
    if KIND != FLOAT32:
        products = tl.fma(_high_values(grad, KIND), _high_values(row, KIND), products)
    return tl.sum(tl.sum(products, 1), 1)


@triton.jit
def _low_values(words, KIND: tl.constexpr):
    """The value in int32 words, or the first of two; float32."""
    if KIND == FLOAT32:
        values = words.to(tl.float32, bitcast=True)
    elif KIND == BFLOAT16:
        values = (words << 16).to(tl.float32, bitcast=True)
    else:
        values = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return values


@triton.jit
def _high_values(words, KIND: tl.constexpr):
    """The second of two values in int32 words; float32."""
    if KIND == BFLOAT16:
        values = (words & -65536).to(tl.float32, bitcast=True)
    else:
        values = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return values


@triton.jit
def _words_of(low, high, KIND: tl.constexpr):
    """The int32 words that hold float32 values, rounded to nearest; `high` counts where a word holds two."""
    if KIND == FLOAT32:
        words = low.to(tl.int32, bitcast=True)
    elif KIND == BFLOAT16:
        words = _joined(low.to(tl.bfloat16), high.to(tl.bfloat16))
    else:
        words = _joined(low.to(tl.float16), high.to(tl.float16))
    return words


@triton.jit
def _joined(first, second):
    """int32 words of two values of 16 bits."""
    upper = second.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return upper | (first.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF)
