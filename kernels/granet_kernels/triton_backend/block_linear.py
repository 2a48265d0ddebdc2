"""granet::linear and its gradients on a CUDA device, for masks of square blocks."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from granet_kernels.triton_backend import chip
from granet_kernels.triton_backend.block_index import BlockIndex, BlockLines
from granet_kernels.triton_backend.block_tilings import (
    Tiling,
    enough,
    matmul_tilings,
    wgrad_tilings,
)
from granet_kernels.triton_backend.blocks import (
    _block_matmul_kernel,
    _block_wgrad_kernel,
    _block_wgrad_sum_kernel,
)

_FILL = 4096  # elements that a program sets to 0 at once
_MOST_SPLITS = 8
_SPLIT_COST = 256  # rows of x in whose time a program begins and ends; again as many, to write what is to be summed
_SUMMED = 16  # rows of a block that a program of the sum takes


def block_linear(
    x: Tensor, weight: Tensor, index: BlockIndex, bias: Tensor | None, tiling: Tiling | None = None
) -> Tensor:
    """reference.linear_ref of a mask with this index.

    Args:
        x: (n, in), weight: (out, in), bias: (out,), all of one dtype: float32, bfloat16 or float16.
        tiling: one of matmul_tilings; None = by the device and the number of programs.
    """
    y = x.new_empty(x.shape[0], weight.shape[0])
    _matmul(x, weight, index.size, index.rows, bias, y, tiling)
    return y


def block_linear_dgrad(grad: Tensor, weight: Tensor, index: BlockIndex, tiling: Tiling | None = None) -> Tensor:
    """reference.linear_dgrad_ref: a gather along the columns of blocks, so the sums have a fixed order.

    Args:
        grad: (n, out), weight: (out, in), of one dtype; tiling: as for block_linear.
    """
    x_grad = grad.new_empty(grad.shape[0], weight.shape[1])
    _matmul(grad, weight.t(), index.size, index.columns, None, x_grad, tiling)
    return x_grad


def block_linear_wgrad(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    index: BlockIndex,
    tiling: Tiling | None = None,
    splits: int | None = None,
) -> Tensor:
    """reference.linear_wgrad_ref, in the layout of the mask.

    Args:
        grad: (n, out), x: (n, in), of one dtype; mask: (out, in) bool, of this index.
        tiling: one of wgrad_tilings; None = by the device and the number of programs.
        splits: in how many parts of the rows of x to sum, each in order; None = by the device and the number of blocks.
    """
    grad, x = _rows_contiguous(grad), _rows_contiguous(x)
    n, size, across = grad.shape[0], index.size, index.rows.blocks.shape[1]
    precision = _precision(grad)
    if tiling is None:
        # A row has one group or more; how many does not count, so that a change of the mask compiles nothing anew.
        most = len(index.row_counts) * _most_splits(n)
        tiling = enough(wgrad_tilings(size, grad, precision), lambda _: most, grad.device)
    groups = index.groups(tiling.rows // size)
    splits = splits or _splits(groups.shape[0], n, tiling.rows * size, grad.device)
    depth = triton.cdiv(n, splits * tiling.inner) * tiling.inner
    w_grad = grad.new_empty(mask.shape)
    parts_shape = (splits if splits > 1 else 0, groups.shape[0], size, tiling.rows)
    parts = grad.new_empty(parts_shape, dtype=torch.float32)
    rows = index.rows.order, index.rows.counts, index.rows.blocks
    _block_wgrad_kernel[(groups.shape[0], splits)](
        grad,
        x,
        groups,
        *rows,
        parts,
        w_grad,
        n,
        depth,
        across,
        grad.stride(0),
        x.stride(0),
        w_grad.stride(0),
        SIZE=size,
        BLOCK_M=tiling.rows,
        BLOCK_K=tiling.inner,
        BLOCK_FILL=max(_FILL // size, size),
        PRECISION=precision,
        WIDEN=not chip.has_tensor_cores(x.device),
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if splits > 1:
        _block_wgrad_sum_kernel[(groups.shape[0], size // _SUMMED)](
            parts,
            groups,
            *rows,
            w_grad,
            splits,
            across,
            w_grad.stride(0),
            SIZE=size,
            BLOCK_M=tiling.rows,
            BLOCK_N=_SUMMED,
        )
    if w_grad.stride() == mask.stride():
        return w_grad
    return torch.empty_like(mask, dtype=grad.dtype).copy_(w_grad)


def _matmul(
    x: Tensor, weight: Tensor, size: int, lines: BlockLines, bias: Tensor | None, y: Tensor, tiling: Tiling | None
) -> None:
    """y = x weightᵀ + bias, where `lines` are those of the first dimension of the weight."""
    x = _rows_contiguous(x)
    precision = _precision(x)
    n, (count, across) = x.shape[0], lines.blocks.shape
    if not n:
        return
    if tiling is None:
        tiling = enough(matmul_tilings(size, x, precision), lambda each: triton.cdiv(n, each.rows) * count, x.device)
    _block_matmul_kernel[(triton.cdiv(n, tiling.rows) * count,)](
        x,
        weight,
        lines.order,
        lines.counts,
        lines.blocks,
        x if bias is None else bias.contiguous(),
        y,
        n,
        count,
        across,
        x.stride(0),
        y.stride(0),
        weight.stride(0),
        weight.stride(1),
        SIZE=size,
        BLOCK_N=tiling.rows,
        BLOCK_K=tiling.inner,
        PRECISION=precision,
        WIDEN=not chip.has_tensor_cores(x.device),
        HAS_BIAS=bias is not None,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def _splits(groups: int, n: int, tile: int, device: torch.device) -> int:
    """In how many parts to sum n rows, so that the programs fill the device for the shortest time."""
    at_once = chip.processors(device) * (2 if tile <= 2**14 else 1)  # what registers and shared memory have room for

    def time(splits: int) -> float:
        return triton.cdiv(groups * splits, at_once) * (n / splits + _SPLIT_COST * (2 if splits > 1 else 1))

    return min(range(1, _most_splits(n) + 1), key=time)


def _most_splits(n: int) -> int:
    return max(1, min(_MOST_SPLITS, n // _SPLIT_COST))


def _rows_contiguous(values: Tensor) -> Tensor:
    return values if values.stride(1) == 1 else values.contiguous()


def _precision(values: Tensor) -> str:
    """What torch does with float32 in a Linear layer: IEEE, unless it has been allowed TF32."""
    allowed = values.dtype == torch.float32 and values.is_cuda and chip.allows_tf32()
    return "tf32" if allowed else "ieee"
