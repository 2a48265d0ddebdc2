"""Dense convolutions of images in NCHW by way of channels_last, where that is faster, conversions included.

torch's convolutions of NCHW reorder every operand into a blocked format and back, in new memory; of channels_last they
do not. Converted by this library into memory that is used again, large images take up to half the time so.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels import plan
from granet_kernels.cpu_backend import library, memory
from granet_kernels.cpu_backend.calls import Call
from granet_kernels.eager import is_eager
from granet_kernels.plan_times import Turns

Geometry = Sequence[Any]  # stride, padding, dilation, groups

FORWARD, BACKWARD, DGRAD, WGRAD = "forward", "backward", "dgrad", "wgrad"


def conv2d(call: Call | None, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """F.conv2d, with its derivatives, of operands that `call` was found for."""
    if call is None or not _may_convert(call):
        return F.conv2d(x, weight, bias, *geometry)
    y: Tensor = _Conv2d.apply(x, weight, bias, geometry, call)
    return y


def forward(call: Call | None, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """F.conv2d without derivatives."""

    def compute(converts: bool) -> Tensor:
        if not converts:
            return F.conv2d(x, weight, bias, *geometry)
        return to_nchw(F.conv2d(to_channels_last(x), to_channels_last(weight), bias, *geometry))

    return _fastest(call, (FORWARD,), compute)


def backward(
    call: Call | None, name: str, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight, those that are wanted; of an operand whose values do not count, its shape does.

    Args:
        name: DGRAD, WGRAD or BACKWARD, whose times are told apart.
    """

    def compute(converts: bool) -> tuple[Tensor | None, Tensor | None]:
        if not converts:
            x_grad, w_grad, _ = _convolution_backward(grad, x, weight, geometry, (*wanted, False))
            return x_grad, w_grad
        operands = (
            to_channels_last(grad),
            to_channels_last(x) if wanted[1] else _shape_only(x),
            to_channels_last(weight) if wanted[0] else _shape_only(weight),
        )
        x_grad, w_grad, _ = _convolution_backward(*operands, geometry, (*wanted, False))
        return None if x_grad is None else to_nchw(x_grad), None if w_grad is None else to_nchw(w_grad)

    read = [grad, *(operand for operand, counts in ((x, wanted[1]), (weight, wanted[0])) if counts)]
    return _fastest(call if all(map(_is_plain, read)) else None, (name, *wanted), compute)


class _Conv2d(torch.autograd.Function):
    """F.conv2d, each way of which goes through channels_last or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, call: Call) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.call = geometry, call
        return forward(call, x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted, bias_wanted = ctx.needs_input_grad[:2], ctx.needs_input_grad[2]
        bias_grad = grad.sum((0, 2, 3)) if bias_wanted else None
        if not any(wanted):
            return None, None, bias_grad, None, None
        # torch's own is differentiable, and has rules for all that torch does.
        if torch.is_grad_enabled() or not is_eager(grad, x, weight):
            x_grad, w_grad, _ = _convolution_backward(grad, x, weight, ctx.geometry, (*wanted, False))
        else:
            x_grad, w_grad = backward(ctx.call, BACKWARD, grad, x, weight, ctx.geometry, wanted)
        return x_grad, w_grad, bias_grad, None, None


def to_channels_last(images: Tensor) -> Tensor:
    """images.contiguous(memory_format=torch.channels_last) of contiguous float32."""
    n, c, h, w = images.shape
    if h * w == 1 or c == 1:  # lies the same way in both formats
        return images.as_strided(images.shape, (c * h * w, 1, w * c, c))
    result = memory.empty_strided(images.shape, (c * h * w, 1, w * c, c))
    _transpose(n, c, h * w, images, result)
    return result


def to_nchw(images: Tensor) -> Tensor:
    """images.contiguous() of float32."""
    n, c, h, w = images.shape
    if not images.is_contiguous(memory_format=torch.channels_last):
        return images.contiguous()
    result = memory.empty(images.shape)
    if h * w == 1 or c == 1:  # a view would do, but not as the result of an autograd Function: relu_ refuses it
        return result.copy_(images)
    _transpose(n, h * w, c, images, result)
    return result


def _transpose(n: int, rows: int, columns: int, source: Tensor, target: Tensor) -> None:
    native: Any = library.load()
    library.check(native.granet_transpose(n, rows, columns, source.data_ptr(), target.data_ptr(), library.threads()))


def _fastest(call: Call | None, key: Hashable, compute: Callable[[bool], Any]) -> Any:
    """compute(whether to go through channels_last): what is faster, or what the plan fixes."""
    if call is None or not call.is_nchw:
        return compute(False)
    turns = call.site.turns.get(key) or call.site.turns.setdefault(key, Turns(call.is_large))
    converts, timed = plan.take_turns(turns)
    began = perf_counter()
    result = compute(converts)
    if timed:
        plan.record_turn(turns, converts, perf_counter() - began)
    return result


def _is_plain(images: Tensor) -> bool:
    """Whether they lie in memory as those that the call was found for; saved tensors may come back in another way."""
    return images.is_contiguous() and images.dtype == torch.float32 and not images.is_neg()


def _may_convert(call: Call) -> bool:
    """Whether any direction may go through channels_last, or wants to be timed."""
    if not call.is_nchw:
        return False
    known = [*call.site.turns.values()]
    if len(known) < 2:  # forward, and backward
        return call.is_large or plan.mode() == plan.MEASURED
    return any(plan.take_turns(turns) != (False, False) for turns in known)


def _shape_only(images: Tensor) -> Tensor:
    return torch.empty_like(images, memory_format=torch.channels_last)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = geometry
    result: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, wanted
    )
    return result
