"""Sparse 2-D convolution: the ops granet::conv2d, granet::conv2d_dgrad, granet::conv2d_wgrad and their public function.

The ops take 4-D images, pairs for stride, padding and dilation, and have no defaults; faster implementations attach to
them with ``conv2d_op.register_kernel(device)``. Each is differentiated by the other two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from granet_kernels import plain, settled
from granet_kernels.checks import check_operands
from granet_kernels.eager import is_eager
from granet_kernels.op import Op
from granet_kernels.reference import conv2d_dgrad_ref, conv2d_ref, conv2d_wgrad_ref, image_format

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"

conv2d_op = Op(
    "granet::conv2d",
    conv2d_ref,
    f"(Tensor x, Tensor weight, Tensor mask, Tensor? bias, {_GEOMETRY}, Tensor? dense_wgrad) -> Tensor",
)
conv2d_dgrad_op = Op(
    "granet::conv2d_dgrad",
    conv2d_dgrad_ref,
    f"(Tensor grad, Tensor weight, Tensor mask, SymInt[] x_shape, {_GEOMETRY}, Tensor? dense_wgrad) -> Tensor",
)
conv2d_wgrad_op = Op(
    "granet::conv2d_wgrad",
    conv2d_wgrad_ref,
    f"(Tensor grad, Tensor x, Tensor mask, {_GEOMETRY}, Tensor? dense_wgrad) -> Tensor",
)


def conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dense_wgrad: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with the sparse weight W = where(mask, weight, 0).

    The gradient of the weight is exactly zero off the mask unless dense_wgrad is true when the backward pass runs; see
    ``granet_kernels.linear``, also for FLOP counts and NaN. The result is channels_last if x or weight is.

    Args:
        x: (n, in, h, w) or (in, h, w); float32, float64, bfloat16 or float16.
        weight: (out, in/groups, kh, kw), dtype and device of x.
        mask: shape of weight, bool, True = kept. The weight's gradient takes its memory format.
        bias: (out,) or None.
        stride: one positive int or two (vertical, horizontal).
        padding: one int >= 0 or two, "valid" (none) or "same" (h' = h, w' = w; needs stride 1).
        dilation: one positive int or two.
        groups: divides in and out; groups == in is a depthwise convolution.
        dense_wgrad: 0-dim bool tensor on the cpu; None means never.
    Returns:
        (n, out, h', w') or (out, h', w'), dtype of x.
    Raises:
        ValueError: a shape, dtype, device or number does not fit.
    Source: the dense gradient of a sparse layer as in RigL, arXiv:1911.11134; GraNet, arXiv:2106.10404.
    """
    y = _conv2d_again(x, weight, mask, bias, (stride, padding, dilation, groups), dense_wgrad)
    if y is not None:
        return y
    check_operands("conv2d", x, weight, mask, bias, dense_wgrad)
    _check_channels(x, weight, groups)
    strides = _pair("stride", stride, least=1)
    dilations = _pair("dilation", dilation, least=1)
    if x.dim() == 3:
        return conv2d(x[None], weight, mask, bias, strides, padding, dilations, groups, dense_wgrad)[0]
    if padding == "same":
        x, paddings = _pad_same(x, weight, strides, dilations)
    else:
        paddings = (0, 0) if padding == "valid" else _pair("padding", padding, least=0)
    if min(_output_size(x, weight, strides, paddings, dilations)) < 1:
        raise ValueError(
            f"conv2d: expected x at least as large as the dilated kernel, got x of shape {tuple(x.shape)} with padding "
            f"{paddings} for a kernel {tuple(weight.shape[2:])} with dilation {dilations}"
        )
    operands = (x, weight, mask, bias, strides, paddings, dilations, groups, dense_wgrad)
    eager = is_eager(*operands)
    y = plain.conv2d(*operands) if eager else None
    if y is None:
        y = conv2d_op.run(eager, *operands)
    return y


def _conv2d_again(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, Any, Any, Any],
    dense_wgrad: Tensor | None,
) -> Tensor | None:
    """`conv2d` of operands that nobody has looked at, or None if the last call was not like this one."""
    found = settled.find(x, weight, mask, bias, dense_wgrad, geometry)
    if found is None:
        return None
    known, layout = found
    if known.by_op:
        y: Tensor | None = conv2d_op.again((known.call, layout), x, weight, mask, bias, *known.geometry, dense_wgrad)
        return y
    return plain.conv2d_again(known, x, weight, mask, bias, dense_wgrad)


def _check_channels(x: Tensor, weight: Tensor, groups: int) -> None:
    if weight.dim() != 4:
        raise ValueError(f"conv2d: expected weight of shape (out, in/groups, kh, kw), got shape {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"conv2d: expected groups to divide the {weight.shape[0]} output channels, got {groups}")
    channels = weight.shape[1] * groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(
            f"conv2d: expected x of shape (n, {channels}, h, w) or ({channels}, h, w) for a weight of shape "
            f"{tuple(weight.shape)} and groups {groups}, got shape {tuple(x.shape)}"
        )


def _pair(name: str, value: str | int | Sequence[int], least: int) -> tuple[int, int]:
    """An int or a sequence of one or two as a pair; ValueError if it is something else or below the least."""
    values: tuple[Any, ...] = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    pair = values * 2 if len(values) == 1 else values
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        names = ' or "same" or "valid"' if name == "padding" else ""
        raise ValueError(f"conv2d: expected {name} to be one int >= {least} or two{names}, got {value!r}")
    return pair[0], pair[1]


def _pad_same(
    x: Tensor, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """x and the symmetric padding that keep h and w; what is odd goes below and to the right, as in F.conv2d."""
    if stride != (1, 1):
        raise ValueError(f'conv2d: expected stride 1 with padding "same", got {stride}')
    total_h = dilation[0] * (weight.shape[2] - 1)
    total_w = dilation[1] * (weight.shape[3] - 1)
    if total_h % 2 or total_w % 2:
        x = F.pad(x, (0, total_w % 2, 0, total_h % 2))
    return x, (total_h // 2, total_w // 2)


def _output_size(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    h, w = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    return h, w


@conv2d_op.register_fake
def _conv2d_fake(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_wgrad: Tensor | None,
) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *_output_size(x, weight, stride, padding, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=image_format(x, weight))


@conv2d_dgrad_op.register_fake
def _conv2d_dgrad_fake(
    grad: Tensor, weight: Tensor, mask: Tensor, x_shape: Sequence[int], *geometry_and_flag: Any
) -> Tensor:
    return torch.empty(x_shape, dtype=grad.dtype, device=grad.device, memory_format=image_format(grad, weight))


@conv2d_wgrad_op.register_fake
def _conv2d_wgrad_fake(grad: Tensor, x: Tensor, mask: Tensor, *geometry_and_flag: Any) -> Tensor:
    return torch.empty_like(mask, dtype=grad.dtype)


# In the contexts below the flag is no saved tensor: autograd would refuse a backward pass after the flag was set.
# ctx.geometry is (stride, padding, dilation, groups).


def _conv2d_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, _, *ctx.geometry, ctx.dense_wgrad = inputs
    ctx.x_shape = x.shape
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        mask,
    )


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask = ctx.saved_tensors
    x_grad = w_grad = bias_grad = None
    if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:
        x_grad, w_grad = conv2d_op.gradients(grad, x, weight, mask, *ctx.geometry, ctx.dense_wgrad) or (None, None)
    if ctx.needs_input_grad[0] and x_grad is None:
        x_grad = conv2d_dgrad_op(grad, weight, mask, ctx.x_shape, *ctx.geometry, ctx.dense_wgrad)
    if ctx.needs_input_grad[1] and w_grad is None:
        w_grad = conv2d_wgrad_op(grad, x, mask, *ctx.geometry, ctx.dense_wgrad)
    if ctx.needs_input_grad[3]:
        bias_grad = grad.sum((0, 2, 3))
    return x_grad, w_grad, None, bias_grad, None, None, None, None, None


def _conv2d_dgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, mask, _, *ctx.geometry, ctx.dense_wgrad = inputs
    ctx.save_for_backward(
        grad if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        mask,
    )


def _conv2d_dgrad_backward(ctx: Any, x_cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight, mask = ctx.saved_tensors
    grad_grad = w_grad = None
    if ctx.needs_input_grad[0]:
        grad_grad = conv2d_op(x_cotangent, weight, mask, None, *ctx.geometry, ctx.dense_wgrad)
    if ctx.needs_input_grad[1]:
        w_grad = conv2d_wgrad_op(grad, x_cotangent, mask, *ctx.geometry, ctx.dense_wgrad)
    return grad_grad, w_grad, None, None, None, None, None, None, None


def _conv2d_wgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, mask, *ctx.geometry, ctx.dense_wgrad = inputs
    ctx.x_shape = x.shape
    ctx.save_for_backward(
        grad if ctx.needs_input_grad[1] else None,
        x if ctx.needs_input_grad[0] else None,
        mask,
    )


def _conv2d_wgrad_backward(ctx: Any, w_cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, mask = ctx.saved_tensors
    computed = mask if ctx.dense_wgrad is None else mask | ctx.dense_wgrad
    grad_grad = x_grad = None
    if ctx.needs_input_grad[0]:
        grad_grad = conv2d_op(x, w_cotangent, computed, None, *ctx.geometry, None)
    if ctx.needs_input_grad[1]:
        x_grad = conv2d_dgrad_op(grad, w_cotangent, computed, ctx.x_shape, *ctx.geometry, None)
    return grad_grad, x_grad, None, None, None, None, None, None


conv2d_op.register_autograd(_conv2d_backward, setup_context=_conv2d_context)
conv2d_dgrad_op.register_autograd(_conv2d_dgrad_backward, setup_context=_conv2d_dgrad_context)
conv2d_wgrad_op.register_autograd(_conv2d_wgrad_backward, setup_context=_conv2d_wgrad_context)


def _flops(y_shape: Sequence[int], w_shape: Sequence[int]) -> int:
    """2·MAC of the dense convolution: every weight meets every output pixel of every image."""
    n, _, h, w = y_shape
    out, inner, kh, kw = w_shape
    return 2 * n * h * w * out * inner * kh * kw


@register_flop_formula(torch.ops.granet.conv2d)
def _conv2d_flops(x_shape: torch.Size, w_shape: torch.Size, *args: Any, out_shape: torch.Size, **kwargs: Any) -> int:
    return _flops(out_shape, w_shape)


@register_flop_formula(torch.ops.granet.conv2d_dgrad)
def _conv2d_dgrad_flops(grad_shape: torch.Size, w_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _flops(grad_shape, w_shape)


@register_flop_formula(torch.ops.granet.conv2d_wgrad)
def _conv2d_wgrad_flops(
    grad_shape: torch.Size, x_shape: torch.Size, mask_shape: torch.Size, *args: Any, **kwargs: Any
) -> int:
    return _flops(grad_shape, mask_shape)
