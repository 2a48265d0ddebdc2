"""A linear layer whose mask is unstructured: forward, input gradient, and weight gradient at kept positions.

All three move activations into panels first, and the first two their result out of them. At 4096 x 4096 x 4096 in
float32 such a copy moves 128 MiB, read and written, where the product gathers 26 GiB at a density of a tenth.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from granet_kernels.triton_backend import chip
from granet_kernels.triton_backend.csr import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    _pack_kernel,
    _product_kernel,
    _sampled_kernel,
    _scatter_kernel,
)
from granet_kernels.triton_backend.csr_index import CsrIndex, Lanes
from granet_kernels.triton_backend.panels import from_panels, to_panels
from granet_kernels.triton_backend.tilings import Tiling, product_tilings, wgrad_tilings

KINDS = {torch.float32: FLOAT32.value, torch.bfloat16: BFLOAT16.value, torch.float16: FLOAT16.value}
_BLOCK = 1024  # entries that a program packs or scatters at a time
_CHUNKS = 32  # programs of a group that do so
_PROGRAMS = 264  # that a weight gradient is cut into: two on each multiprocessor of an H200


def csr_linear(
    x: Tensor, weight: Tensor, index: CsrIndex, bias: Tensor | None = None, tiling: Tiling | None = None
) -> Tensor:
    """What `linear_ref` computes with the mask of the index.

    Args:
        x: (n, in) float32, bfloat16 or float16, any strides, as all operands.
        weight: (out, in), which counts at kept positions only; bias: (out,).
        tiling: None = the first of `product_tilings`.
    Returns:
        (n, out), contiguous.
    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    return _product(x, weight, index.rows, bias, tiling)


def csr_linear_dgrad(grad: Tensor, weight: Tensor, index: CsrIndex, tiling: Tiling | None = None) -> Tensor:
    """What `linear_dgrad_ref` computes: grad (n, out), weight (out, in) -> (n, in), contiguous. See `csr_linear`."""
    return _product(grad, weight.t(), index.columns, None, tiling)


def csr_linear_wgrad(grad: Tensor, x: Tensor, mask: Tensor, index: CsrIndex, tiling: Tiling | None = None) -> Tensor:
    """What `linear_wgrad_ref` computes, at kept positions only.

    Args:
        grad: (n, out) and x: (n, in), of one dtype as in `csr_linear`.
        mask: (out, in), the one that the index is of.
        tiling: None = the first of `wgrad_tilings`.
    Returns:
        (out, in) in the mask's layout, exactly zero off the mask.
    Raises:
        ValueError: a shape or dtype that does not fit.
    """
    lanes = index.rows
    _check(grad, (len(x), lanes.lines), x.dtype)
    _check(x, (len(grad), lanes.width), grad.dtype)
    w_grad = torch.zeros_like(mask, dtype=x.dtype)
    if 0 in (len(x), index.nnz):
        return w_grad
    tiling = tiling or wgrad_tilings(x.dtype, chip.capability(x.device))[0]
    grad_panels, x_panels = to_panels(grad, tiling.panel), to_panels(x, tiling.panel)
    splits = _splits(lanes, len(x_panels))
    partial = x.new_empty(splits, lanes.capacity, dtype=torch.float32)
    _sampled_kernel[(lanes.groups * splits,)](
        lanes.entries,
        lanes.begins,
        lanes.order,
        grad_panels,
        x_panels,
        partial,
        lanes.groups,
        grad_panels.shape[1],
        x_panels.shape[1],
        len(x_panels),
        splits,
        lanes.capacity,
        KIND=KINDS[x.dtype],
        PARTS=tiling.parts,
        PART=tiling.part,
        LINES=lanes.group,
        num_warps=tiling.warps(lanes.group),
        num_stages=1,
        maxnreg=tiling.registers,
    )
    _scatter_kernel[(lanes.groups * _CHUNKS,)](
        partial,
        lanes.entries,
        lanes.begins,
        lanes.order,
        w_grad,
        lanes.width,
        splits,
        lanes.capacity,
        *w_grad.stride(),
        LINES=lanes.group,
        BLOCK=_BLOCK,
        CHUNKS=_CHUNKS,
        num_warps=4,
    )
    return w_grad


def _product(x: Tensor, weight: Tensor, lanes: Lanes, bias: Tensor | None, tiling: Tiling | None) -> Tensor:
    """x (n, width) times the transpose of a matrix (lines, width) at the entries of the lanes: (n, lines)."""
    _check(x, (len(x), lanes.width), x.dtype)
    _check(weight, (lanes.lines, lanes.width), weight.dtype)
    tiling = tiling or product_tilings(x.dtype, chip.capability(x.device))[0]
    x_panels = to_panels(x, tiling.panel)
    y_panels = x.new_empty(len(x_panels), lanes.lines, tiling.panel, dtype=torch.int32)
    if y_panels.numel():
        pairs = _packed(weight, lanes, tiling.panel)
        _product_kernel[(lanes.groups * len(x_panels),)](
            pairs,
            lanes.begins,
            lanes.order,
            x_panels,
            y_panels,
            pairs if bias is None else bias.contiguous(),
            lanes.groups,
            x_panels.shape[1],
            lanes.lines,
            BIAS=bias is not None,
            KIND=KINDS[x.dtype],
            PARTS=tiling.parts,
            PART=tiling.part,
            LINES=lanes.group,
            UNROLL=tiling.unroll,
            num_warps=tiling.warps(lanes.group),
            num_stages=1,
            maxnreg=tiling.registers,
        )
    return from_panels(y_panels, len(x), x.dtype)


def _packed(weight: Tensor, lanes: Lanes, panel: int) -> Tensor:
    """(capacity,) int64: of each entry where its row of a panel begins, and the weight there, side by side.

    Weights lie all over a matrix, and the product reads each once for every panel: so they are gathered once.
    """
    pairs = lanes.entries.new_empty(lanes.capacity, dtype=torch.int64)
    _pack_kernel[(lanes.groups * _CHUNKS,)](
        weight,
        lanes.entries,
        lanes.begins,
        lanes.order,
        pairs,
        lanes.width,
        *weight.stride(),
        PANEL=panel,
        LINES=lanes.group,
        BLOCK=_BLOCK,
        CHUNKS=_CHUNKS,
        num_warps=4,
    )
    return pairs


def _splits(lanes: Lanes, panels: int) -> int:
    """Into how many shares the panels are cut: enough to keep a GPU busy, and sums no larger than two dense results."""
    wanted = triton.cdiv(_PROGRAMS, lanes.groups)
    return max(1, min(panels, wanted, 2 * lanes.lines * lanes.width // lanes.capacity))


def _check(values: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if values.shape != shape or values.dtype != dtype or dtype not in KINDS:
        names = [str(each) for each in KINDS]
        raise ValueError(f"expected {shape} of one of {names}, got {tuple(values.shape)} {values.dtype}")
