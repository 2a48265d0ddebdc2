"""The dense implementation of the ops on a CPU: what reference.py specifies, without the detours.

A weight that is zero off the mask as it is, and that is the rule, need not be masked: to look takes a part of the time
that a copy takes. The gradients of a convolution come from ATen directly: torch.nn.grad passes it one expanded number
for the operand that only lends its shape, and ATen then copies that out to full size.

`full` says that the mask keeps everything, so that nothing has to be masked; `call` is what was found for the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels.cpu_backend import formats, library, memory
from granet_kernels.cpu_backend.calls import Call
from granet_kernels.reference import image_format

P = ParamSpec("P")

# As many bits.
INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


def _as_given(compute: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let it compute in the dtype of its operands under autocast, too: whoever wants them cast has done so."""

    @wraps(compute)
    def computed(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return compute(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return compute(*args, **kwargs)

    return computed


@_as_given
def linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, full: bool = False) -> Tensor:
    """reference.linear_ref."""
    return F.linear(x, masked(weight, mask, full), bias)


@_as_given
def linear_dgrad(grad: Tensor, weight: Tensor, mask: Tensor, full: bool = False) -> Tensor:
    """reference.linear_dgrad_ref."""
    return grad @ masked(weight, mask, full)


@_as_given
def linear_wgrad(grad: Tensor, x: Tensor, mask: Tensor, full: bool = False) -> Tensor:
    """reference.linear_wgrad_ref; with `full` the dense gradient."""
    return as_gradient(grad.t() @ x, mask, full)


@_as_given
def conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    full: bool = False,
    call: Call | None = None,
) -> Tensor:
    """reference.conv2d_ref."""
    geometry = tuple(stride), tuple(padding), tuple(dilation), groups
    y = formats.forward(call, x, masked(weight, mask, full), bias, geometry)
    return y.contiguous(memory_format=image_format(x, weight))


@_as_given
def conv2d_dgrad(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    full: bool = False,
    call: Call | None = None,
) -> Tensor:
    """reference.conv2d_dgrad_ref."""
    layout = image_format(grad, weight)
    shape_only = torch.empty(tuple(x_shape), dtype=grad.dtype, device="cpu", memory_format=layout)
    operands = grad, shape_only, masked(weight, mask, full)
    x_grad, _ = formats.backward(call, formats.DGRAD, *operands, (stride, padding, dilation, groups), (True, False))
    assert x_grad is not None
    return x_grad.contiguous(memory_format=layout)


@_as_given
def conv2d_wgrad(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    full: bool = False,
    call: Call | None = None,
) -> Tensor:
    """reference.conv2d_wgrad_ref; with `full` the dense gradient."""
    shape_only = torch.empty_like(mask, dtype=grad.dtype)
    geometry = stride, padding, dilation, groups
    _, w_grad = formats.backward(call, formats.WGRAD, grad, x, shape_only, geometry, (False, True))
    assert w_grad is not None
    return as_gradient(w_grad, mask, full)


def masked(values: Tensor, mask: Tensor, full: bool = False) -> Tensor:
    """torch.where(mask, values, 0), to the bit; `values` themselves if that changes nothing."""
    if full or is_zero_off(values, mask):
        return values
    if _is_for_library(values, mask):
        result = memory.empty_like(mask)
        _mask_values(values, mask, result)
        return result
    integer = INTEGER.get(values.dtype)
    if integer is None or not values.is_cpu:
        return torch.where(mask, values, 0)
    return (_all_bits(mask) & values.view(integer)).view(values.dtype)  # in this order: the mask settles the strides


def is_zero_off(values: Tensor, mask: Tensor) -> bool:
    """Whether masking would change no bit, where the library can tell; False where it cannot."""
    if not _is_for_library(values, mask):
        return False
    native: Any = library.load()
    return bool(native.granet_is_zero_off(mask.numel(), values.data_ptr(), mask.data_ptr(), library.threads()))


def as_gradient(w_grad: Tensor, mask: Tensor, full: bool = False) -> Tensor:
    """Zero a dense gradient off the mask, in place, and lay it as the mask lies.

    Args:
        w_grad: the caller's own, each value in a place of its own.
    """
    if not full and _is_for_library(w_grad, mask):
        _mask_values(w_grad, mask, w_grad)
    elif not full:
        w_grad.view(INTEGER[w_grad.dtype]).bitwise_and_(_all_bits(mask))
    if w_grad.stride() == mask.stride():
        return w_grad
    return torch.empty_like(mask, dtype=w_grad.dtype).copy_(w_grad)


def _is_for_library(values: Tensor, mask: Tensor) -> bool:
    """Whether both lie dense in memory, in the same order, as the library reads them."""
    return (
        values.dtype == torch.float32
        and mask.dtype == torch.bool
        and values.is_cpu
        and mask.is_cpu
        and values.shape == mask.shape
        and values.stride() == mask.stride()
        and (mask.is_contiguous() or (mask.dim() == 4 and mask.is_contiguous(memory_format=torch.channels_last)))
        and library.load() is not None
    )


def _mask_values(values: Tensor, mask: Tensor, result: Tensor) -> None:
    native: Any = library.load()
    operands = mask.numel(), values.data_ptr(), mask.data_ptr(), result.data_ptr()
    library.check(native.granet_mask_values(*operands, library.threads()))


def _all_bits(mask: Tensor) -> Tensor:
    """int8 of the mask's shape: -1, all bits set, where True, else 0."""
    return mask.view(torch.int8).neg()
