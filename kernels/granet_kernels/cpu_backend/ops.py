"""The CPU implementations of the linear and conv2d ops: what the plan chooses, native code or torch's dense operations.

Native code takes float32 without groups; everything else is computed densely. All that depends on shapes and strides
alone is worked out once for each combination and looked up afterwards: small layers are over in microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from granet_kernels import plan
from granet_kernels.conv2d import conv2d_dgrad_op, conv2d_op, conv2d_wgrad_op
from granet_kernels.cpu_backend import dense, library, memory
from granet_kernels.cpu_backend.calls import Call, Pair, find_call, find_gradients
from granet_kernels.layout import SparseLayout, layout_of
from granet_kernels.linear import linear_dgrad_op, linear_op, linear_wgrad_op

_UNSUPPORTED = 2  # the status of the library
Found = tuple[Call, SparseLayout]
_ONE_WALK = 2  # what granet_conv2d_reads_once says where both gradients share the loads of their products


@linear_op.register_kernel("cpu", finding=True)
def _linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_wgrad: Tensor | None,
    found: Found | None = None,
) -> Tensor:
    if found is None:
        call = find_call("linear", "forward", x, weight, mask, bias)
        if call is None:
            return dense.linear(x, weight, mask, bias)
        found = call, layout_of(mask)
    call, layout = found
    return _run(
        call,
        layout,
        lambda layout: _forward(call, layout, x, weight, mask, bias),
        lambda full: dense.linear(x, weight, mask, bias, full),
    )


@linear_dgrad_op.register_kernel("cpu")
def _linear_dgrad(grad: Tensor, weight: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    call = find_call("linear", "dgrad", grad, weight, mask)
    if call is None:
        return dense.linear_dgrad(grad, weight, mask)
    return _run(
        call,
        layout_of(mask),
        lambda layout: _dgrad(call, layout, grad, weight, mask),
        lambda full: dense.linear_dgrad(grad, weight, mask, full),
    )


@linear_wgrad_op.register_kernel("cpu")
def _linear_wgrad(grad: Tensor, x: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    if dense_wgrad is not None and dense_wgrad:
        return dense.linear_wgrad(grad, x, mask, full=True)
    call = find_call("linear", "wgrad", grad, x, mask)
    if call is None:
        return dense.linear_wgrad(grad, x, mask)
    return _run(
        call,
        layout_of(mask),
        lambda layout: _wgrad(call, layout, grad, x, mask),
        lambda full: dense.linear_wgrad(grad, x, mask, full),
    )


@conv2d_op.register_kernel("cpu", finding=True)
def _conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    dense_wgrad: Tensor | None,
    found: Found | None = None,
) -> Tensor:
    geometry = stride, padding, dilation, groups
    if found is None:
        call = find_call("conv2d", "forward", x, weight, mask, bias, *geometry)
        if call is None:
            return dense.conv2d(x, weight, mask, bias, *geometry)
        found = call, layout_of(mask)
    call, layout = found
    return _run(
        call,
        layout,
        lambda layout: _forward(call, layout, x, weight, mask, bias),
        lambda full: dense.conv2d(x, weight, mask, bias, *geometry, full, call),
    )


@conv2d_dgrad_op.register_kernel("cpu")
def _conv2d_dgrad(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    x_shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    dense_wgrad: Tensor | None,
) -> Tensor:
    geometry = stride, padding, dilation, groups
    call = find_call("conv2d", "dgrad", grad, weight, mask, None, *geometry, x_shape)
    if call is None:
        return dense.conv2d_dgrad(grad, weight, mask, x_shape, *geometry)
    return _run(
        call,
        layout_of(mask),
        lambda layout: _dgrad(call, layout, grad, weight, mask),
        lambda full: dense.conv2d_dgrad(grad, weight, mask, x_shape, *geometry, full, call),
    )


@conv2d_wgrad_op.register_kernel("cpu")
def _conv2d_wgrad(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    dense_wgrad: Tensor | None,
) -> Tensor:
    geometry = stride, padding, dilation, groups
    call = find_call("conv2d", "wgrad", grad, x, mask, None, *geometry)
    if dense_wgrad is not None and dense_wgrad:
        return dense.conv2d_wgrad(grad, x, mask, *geometry, True, call)
    if call is None:
        return dense.conv2d_wgrad(grad, x, mask, *geometry)
    return _run(
        call,
        layout_of(mask),
        lambda layout: _wgrad(call, layout, grad, x, mask),
        lambda full: dense.conv2d_wgrad(grad, x, mask, *geometry, full, call),
    )


@linear_op.register_gradients("cpu", linear_dgrad_op, linear_wgrad_op)
def _linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, dense_wgrad: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    if dense_wgrad is not None and dense_wgrad:
        return None
    calls = find_gradients("linear", grad, x, weight, mask)
    return None if calls is None else _run_both(*calls, grad, x, weight, mask)


@conv2d_op.register_gradients("cpu", conv2d_dgrad_op, conv2d_wgrad_op)
def _conv2d_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    dense_wgrad: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    if dense_wgrad is not None and dense_wgrad:
        return None
    calls = find_gradients("conv2d", grad, x, weight, mask, stride, padding, dilation, groups)
    return None if calls is None else _run_both(*calls, grad, x, weight, mask)


def _run_both(
    dgrad: Call, wgrad: Call, grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Both gradients natively, or None if the plan has other wishes, which are for the ops."""
    layout, calls = layout_of(mask), (dgrad, wgrad)
    sites = dgrad.site, wgrad.site
    all_native, timed = plan.choose_together(sites, layout)
    if not all_native:
        return None
    lib: Any = library.load()
    if timed and not _share_loads(lib, layout, dgrad, wgrad):
        return None
    warm = timed and all(plan.is_warm(call.site, call.direction, layout) for call in calls)
    began = perf_counter()
    w = weight if dgrad.fits else _as_mask(weight, mask)
    x_grad, w_grad = memory.empty_strided(dgrad.shape, dgrad.strides), memory.empty_like(mask)
    status = lib.granet_conv2d_backward(
        layout.native,
        dgrad.conv,
        grad.data_ptr(),
        dgrad.first,
        x.data_ptr(),
        wgrad.second,
        w.data_ptr(),
        x_grad.data_ptr(),
        dgrad.second,
        w_grad.data_ptr(),
        dgrad.threads,
    )
    if status == _UNSUPPORTED:
        return None
    library.check(status)
    if timed:
        plan.record_together(sites, layout, perf_counter() - began, warm)
    for call in calls:
        call.site.count(layout.bucket)
        plan.note(call.site, call.direction, layout, plan.NATIVE)
    return x_grad, w_grad


def _share_loads(lib: Any, layout: SparseLayout, dgrad: Call, wgrad: Call) -> bool:
    """Whether one call for both gradients is much faster than two; where it is little, two tell the plan more."""
    strides = dgrad.first, wgrad.second, dgrad.second
    return bool(lib.granet_conv2d_reads_once(layout.native, dgrad.conv, *strides, dgrad.threads) == _ONE_WALK)


def _run(
    call: Call, layout: SparseLayout, native: Callable[[SparseLayout], Tensor | None], densely: Callable[[bool], Tensor]
) -> Tensor:
    """What the plan chooses for a call, timed where the plan wants to know. `native` gives None for what it cannot."""
    implementation, timed = plan.choose(call.site, layout)
    warm = timed and plan.is_warm(call.site, call.direction, layout)
    began = perf_counter()
    result = native(layout) if implementation == plan.NATIVE else None
    if result is None:
        timed = timed and implementation == plan.DENSE
        implementation = plan.DENSE
        result = densely(layout.nnz == layout.numel)
    if timed:
        plan.record(call.site, layout, implementation, perf_counter() - began, warm)
    plan.note(call.site, call.direction, layout, implementation)
    return result


def _forward(
    call: Call, layout: SparseLayout, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None
) -> Tensor | None:
    lib: Any = library.load()
    w = weight if call.fits else _as_mask(weight, mask)
    b = None if bias is None else bias.contiguous()
    y = memory.empty_strided(call.shape, call.strides)
    status = lib.granet_conv2d_forward(
        layout.native,
        call.conv,
        x.data_ptr(),
        call.first,
        w.data_ptr(),
        None if b is None else b.data_ptr(),
        y.data_ptr(),
        call.second,
        call.threads,
    )
    return _checked(call, status, y)


def _dgrad(call: Call, layout: SparseLayout, grad: Tensor, weight: Tensor, mask: Tensor) -> Tensor | None:
    lib: Any = library.load()
    w = weight if call.fits else _as_mask(weight, mask)
    x_grad = memory.empty_strided(call.shape, call.strides)
    status = lib.granet_conv2d_dgrad(
        layout.native,
        call.conv,
        grad.data_ptr(),
        call.first,
        w.data_ptr(),
        x_grad.data_ptr(),
        call.second,
        call.threads,
    )
    return _checked(call, status, x_grad)


def _wgrad(call: Call, layout: SparseLayout, grad: Tensor, x: Tensor, mask: Tensor) -> Tensor | None:
    lib: Any = library.load()
    w_grad = memory.empty_like(mask)
    status = lib.granet_conv2d_wgrad(
        layout.native,
        call.conv,
        grad.data_ptr(),
        call.first,
        x.data_ptr(),
        call.second,
        w_grad.data_ptr(),
        call.threads,
    )
    return _checked(call, status, w_grad)


def _checked(call: Call, status: int, result: Tensor) -> Tensor | None:
    if status == _UNSUPPORTED:
        call.supported = False
        return None
    library.check(status)
    return result


def _as_mask(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight in the mask's strides."""
    return torch.empty_like(mask, dtype=weight.dtype).copy_(weight)
