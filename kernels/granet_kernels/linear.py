"""Sparse linear layer: the ops granet::linear, granet::linear_dgrad, granet::linear_wgrad and their public function.

The ops take 2-D operands and have no defaults; faster implementations attach to them with
``linear_op.register_kernel(device)``. Each is differentiated by the other two, so any order of gradient exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from granet_kernels import plain, settled
from granet_kernels.checks import check_operands
from granet_kernels.eager import is_eager
from granet_kernels.op import Op
from granet_kernels.reference import linear_dgrad_ref, linear_ref, linear_wgrad_ref

linear_op = Op(
    "granet::linear",
    linear_ref,
    "(Tensor x, Tensor weight, Tensor mask, Tensor? bias, Tensor? dense_wgrad) -> Tensor",
)
linear_dgrad_op = Op(
    "granet::linear_dgrad",
    linear_dgrad_ref,
    "(Tensor grad, Tensor weight, Tensor mask, Tensor? dense_wgrad) -> Tensor",
)
linear_wgrad_op = Op(
    "granet::linear_wgrad",
    linear_wgrad_ref,
    "(Tensor grad, Tensor x, Tensor mask, Tensor? dense_wgrad) -> Tensor",
)


def linear(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, dense_wgrad: Tensor | None = None
) -> Tensor:
    """x Wᵀ + bias with W = where(mask, weight, 0): ``torch.nn.functional.linear`` with a sparse weight.

    The gradient of the weight has the weight's shape and is exactly zero off the mask, unless dense_wgrad is true when
    the backward pass runs: then it is the full gradient of W, which a growing method needs for one step. The flag is a
    tensor so that compiled code reads it at run time and is not compiled anew. (Code compiled by torch.compile holds
    the flag as it holds any saved tensor: set it before the forward pass.)

    NaN and inf reach all that kept weights bring them to. At dropped positions sparse code reads nothing, while dense
    code multiplies by 0, and 0 times NaN or inf is NaN: they show in more outputs where the plan is dense.

    Under torch.utils.flop_counter the ops count as dense ones, 2 n·in·out: a formula sees shapes, not masks.

    Args:
        x: (..., in) float32, float64, bfloat16 or float16.
        weight: (out, in), dtype and device of x.
        mask: (out, in) bool, True = kept.
        bias: (out,) or None.
        dense_wgrad: 0-dim bool tensor on the cpu; None means never.
    Returns:
        (..., out), dtype of x.
    Raises:
        ValueError: a shape, dtype or device does not fit.
    Source: the dense gradient of a sparse layer as in RigL, arXiv:1911.11134; GraNet, arXiv:2106.10404.
    """
    y = _linear_again(x, weight, mask, bias, dense_wgrad)
    if y is not None:
        return y
    check_operands("linear", x, weight, mask, bias, dense_wgrad)
    if weight.dim() != 2:
        raise ValueError(f"linear: expected weight of shape (out, in), got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: expected x of shape (..., {weight.shape[1]}), got shape {tuple(x.shape)}")
    operands = (plain.as_rows(x), weight, mask, bias, dense_wgrad)
    eager = is_eager(*operands)
    y = plain.linear(*operands, x) if eager else None
    if y is None:
        y = linear_op.run(eager, *operands)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


def _linear_again(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dense_wgrad: Tensor | None
) -> Tensor | None:
    """`linear` of operands that nobody has looked at, or None if the last call was not like this one."""
    found = settled.find(x, weight, mask, bias, dense_wgrad)
    if found is None:
        return None
    known, layout = found
    rows = plain.as_rows(x)
    if known.by_op:
        y: Tensor | None = linear_op.again((known.call, layout), rows, weight, mask, bias, dense_wgrad)
    else:
        y = plain.linear_again(known, rows, weight, mask, bias, dense_wgrad)
    return y if y is None or x.dim() == 2 else y.reshape(*x.shape[:-1], weight.shape[0])


@linear_op.register_fake
def _linear_fake(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dense_wgrad: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@linear_dgrad_op.register_fake
def _linear_dgrad_fake(grad: Tensor, weight: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


@linear_wgrad_op.register_fake
def _linear_wgrad_fake(grad: Tensor, x: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    return torch.empty_like(mask, dtype=grad.dtype)


# In the contexts below the flag is no saved tensor: autograd would refuse a backward pass after the flag was set.


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, _, ctx.dense_wgrad = inputs
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        mask,
    )


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask = ctx.saved_tensors
    x_grad = w_grad = bias_grad = None
    if ctx.needs_input_grad[0] and ctx.needs_input_grad[1]:
        x_grad, w_grad = linear_op.gradients(grad, x, weight, mask, ctx.dense_wgrad) or (None, None)
    if ctx.needs_input_grad[0] and x_grad is None:
        x_grad = linear_dgrad_op(grad, weight, mask, ctx.dense_wgrad)
    if ctx.needs_input_grad[1] and w_grad is None:
        w_grad = linear_wgrad_op(grad, x, mask, ctx.dense_wgrad)
    if ctx.needs_input_grad[3]:
        bias_grad = grad.sum(0)
    return x_grad, w_grad, None, bias_grad, None


def _linear_dgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, weight, mask, ctx.dense_wgrad = inputs
    ctx.save_for_backward(
        grad if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        mask,
    )


def _linear_dgrad_backward(ctx: Any, x_cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight, mask = ctx.saved_tensors
    grad_grad = w_grad = None
    if ctx.needs_input_grad[0]:
        grad_grad = linear_op(x_cotangent, weight, mask, None, ctx.dense_wgrad)
    if ctx.needs_input_grad[1]:
        w_grad = linear_wgrad_op(grad, x_cotangent, mask, ctx.dense_wgrad)
    return grad_grad, w_grad, None, None


def _linear_wgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, mask, ctx.dense_wgrad = inputs
    ctx.save_for_backward(
        grad if ctx.needs_input_grad[1] else None,
        x if ctx.needs_input_grad[0] else None,
        mask,
    )


def _linear_wgrad_backward(ctx: Any, w_cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, x, mask = ctx.saved_tensors
    computed = mask if ctx.dense_wgrad is None else mask | ctx.dense_wgrad
    grad_grad = x_grad = None
    if ctx.needs_input_grad[0]:
        grad_grad = linear_op(x, w_cotangent, computed, None, None)
    if ctx.needs_input_grad[1]:
        x_grad = linear_dgrad_op(grad, w_cotangent, computed, None)
    return grad_grad, x_grad, None, None


linear_op.register_autograd(_linear_backward, setup_context=_linear_context)
linear_dgrad_op.register_autograd(_linear_dgrad_backward, setup_context=_linear_dgrad_context)
linear_wgrad_op.register_autograd(_linear_wgrad_backward, setup_context=_linear_wgrad_context)


@register_flop_formula([torch.ops.granet.linear, torch.ops.granet.linear_dgrad])
def _linear_flops(
    x_shape: torch.Size, w_shape: torch.Size, *args: Any, out_shape: torch.Size | None = None, **kwargs: Any
) -> int:
    return 2 * x_shape[0] * w_shape[0] * w_shape[1]


@register_flop_formula(torch.ops.granet.linear_wgrad)
def _linear_wgrad_flops(
    grad_shape: torch.Size, x_shape: torch.Size, *args: Any, out_shape: torch.Size | None = None, **kwargs: Any
) -> int:
    return 2 * grad_shape[0] * grad_shape[1] * x_shape[1]
