"""Batch norm, a residual and ReLU in one: the ops granet::norm and granet::norm_backward and their public function.

They normalise with the statistics of the batch, as in training. Faster implementations attach to them with
``norm_op.register_kernel(device)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from granet_kernels.checks import check_like
from granet_kernels.op import Op
from granet_kernels.reference import gate, image_format, norm_backward_ref, norm_gradients, norm_ref

norm_op = Op(
    "granet::norm",
    norm_ref,
    "(Tensor x, Tensor gamma, Tensor beta, Tensor? residual, float eps, bool relu) -> (Tensor, Tensor, Tensor, Tensor)",
)
norm_backward_op = Op(
    "granet::norm_backward",
    norm_backward_ref,
    "(Tensor grad, Tensor x, Tensor? y, Tensor gamma, Tensor beta, Tensor mean, Tensor invstd, float eps,"
    " bool relu) -> (Tensor, Tensor, Tensor, Tensor)",
)


def norm(
    x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None = None, eps: float = 1e-5, relu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act((x - mean) / sqrt(var + eps) * gamma + beta + residual) with the mean and variance of each channel of x.

    act is max(., 0) if relu, else nothing. The statistics returned are for running averages: no gradient flows from
    them. Under torch.utils.flop_counter the ops count as nothing, as torch's batch norm does.

    Args:
        x: (n, c, h, w) float32 or float64, more than one value a channel.
        gamma, beta: (c,), dtype and device of x.
        residual: as x, or None.
        eps: not negative.
        relu: whether the activation follows.
    Returns:
        y (n, c, h, w), channels_last if x is; mean (c,); var (c,), the biased variance.
    Raises:
        ValueError: a shape, dtype or device does not fit, or eps is negative.
    Source: Ioffe & Szegedy, arXiv:1502.03167, algorithm 1.
    """
    _check(x, gamma, beta, residual, eps)
    y, mean, _, var = norm_op(x, gamma, beta, residual, eps, relu)
    return y, mean, var


def _check(x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None, eps: float) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"norm: expected x of dtype float32 or float64, got {x.dtype}")
    if x.dim() != 4:
        raise ValueError(f"norm: expected x of shape (n, c, h, w), got shape {tuple(x.shape)}")
    if x.shape[0] * x.shape[2] * x.shape[3] < 2 or x.shape[1] == 0:
        raise ValueError(f"norm: expected x of more than one value a channel, got shape {tuple(x.shape)}")
    for name, values in (("gamma", gamma), ("beta", beta)):
        check_like("norm", name, values, x.dtype, x.device)
        if values.shape != x.shape[1:2]:
            raise ValueError(f"norm: expected {name} of shape ({x.shape[1]},), got shape {tuple(values.shape)}")
    if residual is not None:
        check_like("norm", "residual", residual, x.dtype, x.device)
        if residual.shape != x.shape:
            raise ValueError(
                f"norm: expected residual of the shape of x {tuple(x.shape)}, got shape {tuple(residual.shape)}"
            )
    if not eps >= 0:
        raise ValueError(f"norm: expected eps >= 0, got {eps}")


@norm_op.register_fake
def _norm_fake(
    x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _image_like(x), torch.empty_like(gamma), torch.empty_like(gamma), torch.empty_like(gamma)


@norm_backward_op.register_fake
def _norm_backward_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    invstd: Tensor,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual_grad = x.new_empty(0) if y is None else _image_like(x)
    return _image_like(x), torch.empty_like(gamma), torch.empty_like(gamma), residual_grad


def _image_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=image_format(x, x))


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gamma, beta, residual, ctx.eps, ctx.relu = inputs
    y, mean, invstd, var = output
    ctx.mark_non_differentiable(mean, invstd, var)
    ctx.set_materialize_grads(False)
    # Without a residual the sign of y follows from x, and y need not be kept.
    ctx.save_for_backward(x, y if ctx.relu and residual is not None else None, gamma, beta, mean, invstd)


def _norm_backward(ctx: Any, grad: Tensor | None, *of_statistics: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    x, y, gamma, beta, mean, invstd = ctx.saved_tensors
    if not any(ctx.needs_input_grad[:3]):
        residual_grad = grad if y is None else torch.where(y <= 0, 0, grad)
        return None, None, None, residual_grad, None, None
    x_grad, gamma_grad, beta_grad, residual_grad = norm_backward_op(
        grad, x, y, gamma, beta, mean, invstd, ctx.eps, ctx.relu
    )
    if not ctx.needs_input_grad[3]:
        return x_grad, gamma_grad, beta_grad, None, None, None
    return x_grad, gamma_grad, beta_grad, grad if y is None else residual_grad, None, None


def _norm_backward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.relu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _norm_backward_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of grad, x and gamma. Where the activation cuts does not move, and mean and invstd are x's own."""
    grad, x, y, gamma, beta, mean, invstd = ctx.saved_tensors
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: grad may itself depend on x, and that way is not this function's to follow.
        grad, x, gamma = (_alias(t) for t in (grad, x, gamma))
        gated = gate(grad, x.detach(), y, gamma.detach(), beta, mean, invstd) if ctx.relu else grad
        results = [*norm_gradients(gated, x, gamma, ctx.eps), gated]
        given = [(r, c) for r, c in zip(results, cotangents, strict=True) if c is not None and r.shape == c.shape]
        grad_grad, x_grad, gamma_grad = torch.autograd.grad(
            [result for result, _ in given],
            [grad, x, gamma],
            [cotangent for _, cotangent in given],
            create_graph=again,
            allow_unused=True,
        )
    return grad_grad, x_grad, None, gamma_grad, None, None, None, None, None


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


norm_op.register_autograd(_norm_backward, setup_context=_norm_context)
norm_backward_op.register_autograd(_norm_backward_backward, setup_context=_norm_backward_context)


@register_flop_formula([torch.ops.granet.norm, torch.ops.granet.norm_backward])
def _no_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 0
