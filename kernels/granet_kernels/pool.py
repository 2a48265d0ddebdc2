"""Max-pooling of 2 x 2 pixels: the ops granet::max_pool and granet::max_pool_backward and their public function.

Faster implementations attach to them with ``max_pool_op.register_kernel(device)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from granet_kernels.op import Op
from granet_kernels.reference import max_pool_backward_ref, max_pool_ref, pick_pixels

max_pool_op = Op("granet::max_pool", max_pool_ref, "(Tensor x) -> (Tensor, Tensor)")
max_pool_backward_op = Op(
    "granet::max_pool_backward",
    max_pool_backward_ref,
    "(Tensor grad, Tensor which, SymInt h, SymInt w) -> Tensor",
)


def max_pool(x: Tensor) -> Tensor:
    """The greatest of every 2 x 2 pixels: ``torch.nn.functional.max_pool2d(x, 2)``, which keeps a byte an output.

    An odd last row or column is left out. NaN is above all; of equal values the first gets the gradient.

    Args:
        x: (n, c, h, w) floating point, h and w at least 2.
    Returns:
        (n, c, h // 2, w // 2), contiguous.
    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if not x.is_floating_point():
        raise ValueError(f"max_pool: expected x of a floating-point dtype, got {x.dtype}")
    if x.dim() != 4 or min(x.shape[2:]) < 2:
        raise ValueError(f"max_pool: expected x of shape (n, c, h >= 2, w >= 2), got shape {tuple(x.shape)}")
    y: Tensor = max_pool_op(x)[0]
    return y


@max_pool_op.register_fake
def _max_pool_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    return x.new_empty(n, c, h // 2, w // 2), x.new_empty(n, c, h // 2, w // 2, dtype=torch.uint8)


@max_pool_backward_op.register_fake
def _max_pool_backward_fake(grad: Tensor, which: Tensor, h: int, w: int) -> Tensor:
    return grad.new_empty(*grad.shape[:2], h, w)


def _max_pool_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    _, which = output
    ctx.size = inputs[0].shape[2:]
    ctx.mark_non_differentiable(which)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(which)


def _max_pool_backward(ctx: Any, grad: Tensor | None, of_which: None) -> Tensor | None:
    if grad is None:
        return None
    x_grad: Tensor = max_pool_backward_op(grad, *ctx.saved_tensors, *ctx.size)
    return x_grad


def _max_pool_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _max_pool_backward_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    return pick_pixels(cotangent, *ctx.saved_tensors), None, None, None


max_pool_op.register_autograd(_max_pool_backward, setup_context=_max_pool_context)
max_pool_backward_op.register_autograd(_max_pool_backward_backward, setup_context=_max_pool_backward_context)


@register_flop_formula([torch.ops.granet.max_pool, torch.ops.granet.max_pool_backward])
def _no_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 0  # comparisons are no floating-point operations
