"""The kernels of a linear layer whose mask consists of square blocks: products of dense tiles, for kept blocks only.

The weight is read where it lies, in the dense Parameter; only the index says which of its blocks exist. Each element of
a result is summed by one program, in the order of the index.
"""

import triton
import triton.language as tl


@triton.jit
def _block_matmul_kernel(
    x,
    weight,
    order,
    counts,
    blocks,
    bias,
    y,
    n,
    lines,
    across,
    x_stride,
    y_stride,
    line_stride,
    inner_stride,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """y[:, line] = sum over the kept blocks of a line of x[:, block] @ block, (+ bias): one program BLOCK_N rows of y.

    A line is a row of blocks of the weight, and then this is the forward pass; or a column, with the strides of the
    weight exchanged, and then it is the gradient of the input. Of blocks smaller than BLOCK_K several are multiplied
    at once.

    Args:
        x: (n, across * SIZE), y: (n, lines * SIZE), rows x_stride and y_stride apart and contiguous.
        order, counts, blocks: as in BlockLines.
        line_stride, inner_stride: of the weight, along the line's own dimension, and along the one that is summed over.
    """
    position = tl.program_id(0) % lines
    first = (tl.program_id(0) // lines).to(tl.int64) * BLOCK_N
    line = tl.load(order + position)
    count = tl.load(counts + position)
    blocks += position * across
    found = _blocks_of(blocks, 0, across, SIZE, BLOCK_K)
    rows = tl.arange(0, BLOCK_N)
    left = tl.minimum(n - first, BLOCK_N).to(tl.int32)
    # Rows beyond the last are that one once more: no load needs a mask, and they are not stored.
    x_rows = x + first * x_stride + tl.minimum(rows, left - 1).to(tl.int64)[:, None] * x_stride
    own = line * SIZE + tl.arange(0, SIZE)
    w_rows = weight + own.to(tl.int64)[None, :] * line_stride
    total = tl.zeros((BLOCK_N, SIZE), tl.float32)
    for step in range(tl.cdiv(count * SIZE, BLOCK_K)):
        places = _places_of(found, step, SIZE, BLOCK_K)
        x_places = x_rows + places[None, :]
        w_places = w_rows + places.to(tl.int64)[:, None] * inner_stride
        if SIZE < BLOCK_K:
            kept = _slots_of(step, SIZE, BLOCK_K) < count
            values = tl.load(x_places, mask=kept[None, :], other=0.0)
            weights = tl.load(w_places, mask=kept[:, None], other=0.0)
        else:
            values = tl.load(x_places)
            weights = tl.load(w_places)
        found = _blocks_of(blocks, step + 1, across, SIZE, BLOCK_K)
        total = _dot(values, weights, total, PRECISION, WIDEN)
    if HAS_BIAS:
        total += tl.load(bias + own)[None, :].to(tl.float32)
    places = y + first * y_stride + rows.to(tl.int64)[:, None] * y_stride + own[None, :]
    tl.store(places, total.to(y.dtype.element_ty), mask=rows[:, None] < left)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """total + a b. WIDEN: multiply in float32. Without tensor cores whole operands of half precision are converted in
    registers, of which there are too few."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _slots_of(step, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which of a line's blocks each of BLOCK_K places belongs to; BLOCK_K is a multiple of SIZE."""
    return step * (BLOCK_K // SIZE) + tl.arange(0, BLOCK_K) // SIZE


@triton.jit
def _blocks_of(blocks, step, across, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The block that a step reads, or of each of its places, if blocks are smaller. One step ahead of its use, and
    without regard to the line's count, so that no load waits for another."""
    if SIZE < BLOCK_K:
        slots = _slots_of(step, SIZE, BLOCK_K)
    else:
        slots = step // (SIZE // BLOCK_K)
    return tl.load(blocks + slots, mask=slots < across, other=0)


@triton.jit
def _places_of(found, step, SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The places along the dimension that is summed over, (BLOCK_K,) int32."""
    inner = tl.arange(0, BLOCK_K)
    if SIZE < BLOCK_K:
        return tl.max_contiguous(tl.multiple_of(found * SIZE + inner % SIZE, SIZE), SIZE)
    return found * SIZE + step % (SIZE // BLOCK_K) * BLOCK_K + inner


@triton.jit
def _block_wgrad_kernel(
    grad,
    x,
    groups,
    order,
    counts,
    blocks,
    parts,
    w_grad,
    n,
    depth,
    across,
    grad_stride,
    x_stride,
    w_stride,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_FILL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """w_grad = gradᵀ x at a group of kept blocks of a row, BLOCK_M columns of x, summed over `depth` rows of x.

    Of the blocks that are not kept each program first sets its share of its row to 0.

    Args:
        grad: (n, out), x: (n, in), w_grad: (out, in), rows grad_stride, x_stride and w_stride apart and contiguous.
        groups: as BlockIndex.groups(BLOCK_M // SIZE); order, counts, blocks: BlockIndex.rows.
        parts: (splits, groups, SIZE, BLOCK_M) float32, for _block_wgrad_sum_kernel, if there are several splits.
    """
    place = tl.load(groups + tl.program_id(0))
    position = place // across
    start = place % across
    count = tl.load(counts + position)
    row = tl.load(order + position)
    blocks += position * across
    own = row * SIZE + tl.arange(0, SIZE)
    w_rows = w_grad + own.to(tl.int64)[None, :] * w_stride
    splits = tl.num_programs(1)
    shares = tl.maximum(tl.cdiv(count, BLOCK_M // SIZE), 1) * splits
    share = start // (BLOCK_M // SIZE) * splits + tl.program_id(1)
    _fill(w_rows, blocks, count, across, share, shares, SIZE, BLOCK_FILL)
    if start < count:
        columns, kept = _columns_of(blocks, start, count, across, SIZE, BLOCK_M)
        inner = tl.arange(0, BLOCK_K)
        begin = tl.program_id(1) * depth
        end = tl.minimum(begin + depth, n)
        rows = (begin + inner).to(tl.int64)
        grads = grad + rows[:, None] * grad_stride + own[None, :]
        values = x + rows[None, :] * x_stride + columns[:, None]
        total = tl.zeros((BLOCK_M, SIZE), tl.float32)
        for first in range(begin, end, BLOCK_K):
            inside = first + inner < end
            left = tl.load(values, mask=kept[:, None] & inside[None, :], other=0.0)
            right = tl.load(grads, mask=inside[:, None], other=0.0)
            total = _dot(left, right, total, PRECISION, WIDEN)
            grads += BLOCK_K * grad_stride
            values += BLOCK_K * x_stride
        if splits > 1:
            tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            offsets = tl.arange(0, SIZE)[None, :] * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
            tl.store(parts + tile * (SIZE * BLOCK_M) + offsets, total)
        else:
            tl.store(w_rows + columns[:, None], total.to(w_grad.dtype.element_ty), mask=kept[:, None])


@triton.jit
def _columns_of(blocks, start, end, across, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of WIDTH / SIZE blocks of a row, those from number `start` on, and which are before number `end`."""
    numbers = tl.arange(0, WIDTH)
    slots = start + numbers // SIZE
    found = tl.load(blocks + slots, mask=slots < across, other=0)
    return tl.max_contiguous(tl.multiple_of(found * SIZE + numbers % SIZE, SIZE), SIZE), slots < end


@triton.jit
def _fill(w_rows, blocks, count, across, share, shares, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Set one of `shares` equal parts of the blocks of a row that are not kept to 0, WIDTH columns at a time."""
    each = tl.cdiv(across - count, shares)
    begin = count + share * each
    end = tl.minimum(begin + each, across)
    zeros = tl.zeros((WIDTH, SIZE), w_rows.dtype.element_ty)
    for start in range(begin, end, WIDTH // SIZE):
        columns, inside = _columns_of(blocks, start, end, across, SIZE, WIDTH)
        tl.store(w_rows + columns[:, None], zeros, mask=inside[:, None])


@triton.jit
def _block_wgrad_sum_kernel(
    parts,
    groups,
    order,
    counts,
    blocks,
    w_grad,
    splits,
    across,
    w_stride,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """w_grad at a group of kept blocks is the sum of the `splits` tiles of its programs, BLOCK_N rows at a time."""
    place = tl.load(groups + tl.program_id(0))
    position = place // across
    count = tl.load(counts + position)
    columns, kept = _columns_of(blocks + position * across, place % across, count, across, SIZE, BLOCK_M)
    own = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = own[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tiles = parts + tl.program_id(0).to(tl.int64) * (SIZE * BLOCK_M) + offsets
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in range(splits):
        total += tl.load(tiles, mask=kept[None, :], other=0.0)
        tiles += tl.num_programs(0).to(tl.int64) * (SIZE * BLOCK_M)
    rows = (tl.load(order + position) * SIZE + own).to(tl.int64)
    tl.store(w_grad + rows[:, None] * w_stride + columns[None, :], total.to(w_grad.dtype.element_ty), kept[None, :])
