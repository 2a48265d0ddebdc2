"""Layers that run densely in every direction, as torch's own layers with a masked weight; all others are for the ops.

An op has a kernel of its own for each direction, and looks at the weight in each. Where nothing is to be gained by
sparse code, torch's autograd is the faster way to the same numbers. Which way a call went is remembered for the next.
All of this is for operands of which `is_eager` is true.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels import plan, settled
from granet_kernels.cpu_backend import dense, formats
from granet_kernels.cpu_backend.calls import Call, find_call
from granet_kernels.eager import is_eager, packs_saved_tensors
from granet_kernels.layout import layout_of
from granet_kernels.reference import image_format
from granet_kernels.triton_backend import support

_MOST_FAN_IN = 32  # of a full layer that native code may win: it has a third of torch's time for images in RGB
_MOST_MASKED = 2**18  # weights; a larger layer would hold a masked copy that counts
_MOST_OF_CONV2D = 2**18  # weights; the directions of a larger convolution are better computed one by one


def linear(
    rows: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dense_wgrad: Tensor | None, x: Tensor
) -> Tensor | None:
    """granet_kernels.linear of the rows of x, or None if that is for the op."""
    found = _weight("linear", rows, weight, mask, bias, dense_wgrad, given=x)
    return None if found is None else F.linear(rows, found[0], bias)


def linear_again(
    found: settled.Settled,
    rows: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_wgrad: Tensor | None,
) -> Tensor:
    """granet_kernels.linear of operands that `found` covers."""
    return F.linear(rows, _weight_again(found, weight, mask, dense_wgrad), bias)


def as_rows(x: Tensor) -> Tensor:
    """(..., in) as (n, in)."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    dense_wgrad: Tensor | None,
) -> Tensor | None:
    """granet_kernels.conv2d of a batch, or None if that is for the op."""
    geometry = stride, padding, dilation, groups
    found = _weight("conv2d", x, weight, mask, bias, dense_wgrad, geometry)
    if found is None:
        return None
    effective, call = found
    if call is not None and effective.stride() != weight.stride():
        call = find_call("conv2d", "forward", x, effective, mask, bias, *geometry)
    return formats.conv2d(call, x, effective, bias, geometry).contiguous(memory_format=image_format(x, weight))


def conv2d_again(
    found: settled.Settled,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_wgrad: Tensor | None,
) -> Tensor:
    """granet_kernels.conv2d of operands that `found` covers."""
    effective = _weight_again(found, weight, mask, dense_wgrad)
    y = formats.conv2d(found.call, x, effective, bias, found.geometry)
    return y.contiguous(memory_format=image_format(x, weight))


class _Masked(torch.autograd.Function):
    """where(mask, values, 0), with the gradient of a sparse layer's weight."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.dense_wgrad = dense_wgrad
        result = dense.masked(values, mask)
        return result.detach() if result is values else result  # no view, of which autograd has other rules

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return _masked_gradient(grad, mask, ctx.dense_wgrad), None, None


def _with_masked_gradient(weight: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    """A weight that is zero off the mask, with the gradient of a sparse layer's weight: for a single product.

    A hook on a view takes a third of the time that an autograd Function takes.
    """
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    version = None if mask.is_inference() else mask._version

    def hook(grad: Tensor) -> Tensor:
        if version is not None and mask._version != version:
            raise RuntimeError(
                "a mask that the gradient of a sparse layer needs has been modified by an inplace operation since the "
                f"forward pass: expected version {version}, got {mask._version}"
            )
        return _masked_gradient(grad, mask, dense_wgrad)

    view = weight.view_as(weight)
    view.register_hook(hook)
    return view


def _masked_gradient(grad: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    if dense_wgrad is not None and dense_wgrad:
        return grad
    if torch.is_grad_enabled() or not grad.is_cpu or not is_eager(grad):
        return torch.where(mask, grad, 0)
    # New from the only product that the weight is in: nobody else holds it.
    return dense.as_gradient(grad, mask)


def _weight_again(found: settled.Settled, weight: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    return weight if found.full else _with_masked_gradient(weight, mask, dense_wgrad)


def _weight(
    op: str,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_wgrad: Tensor | None,
    geometry: Sequence[Any] = (),
    given: Tensor | None = None,
) -> tuple[Tensor, Call | None] | None:
    """The weight to hand to torch and the call that was found, or None if the op is to be called.

    `given`: x as the caller has it, where that is not `x`.
    """
    is_cpu = x.is_cpu
    if not (is_cpu or x.is_cuda) or _autocast_would_cast(x, "cpu" if is_cpu else "cuda"):
        return None
    if not is_cpu:
        return _weight_on_gpu(op, x, weight, mask, dense_wgrad)
    native = plan.mode() == plan.NATIVE
    remembers = weight.is_leaf and not mask.is_inference()
    call = find_call(op, "forward", x, weight, mask, bias, *geometry)
    if native and (call is None or not remembers):
        return None
    layout = layout_of(mask)
    layout.settled = None
    if packs_saved_tensors():  # what is saved here and by the op differs, and a measured plan takes turns
        return None
    full = layout.nnz == layout.numel and weight.stride() == mask.stride()
    surely_by_op = native or (op == "conv2d" and not full and layout.numel > _MOST_OF_CONV2D)
    surely_past_it = full and mask.numel() > _MOST_FAN_IN * mask.shape[0]
    sites = _sites(call, x, weight)
    asked = () if surely_by_op or surely_past_it else tuple(sites.values())
    by_op = surely_by_op or (len(asked) > 0 and not plan.agrees_on_dense(asked, layout))
    # It reads all of the weight: not before it is known to be of use.
    unchanged = not by_op and (full or dense.is_zero_off(weight, mask))
    if remembers and (unchanged or (by_op and call is not None)):
        operands = x if given is None else given, weight, mask, bias, dense_wgrad, geometry
        layout.settled = settled.Settled(*operands, asked, call, full, by_op)
    if by_op or (not unchanged and layout.numel > _MOST_MASKED):
        return None
    for direction, site in sites.items():
        plan.note(site, direction, layout, plan.DENSE)
    if full:
        return weight, call
    if unchanged:
        return _with_masked_gradient(weight, mask, dense_wgrad), call
    return _Masked.apply(weight, mask, dense_wgrad), call


def _sites(call: Call | None, x: Tensor, weight: Tensor) -> dict[str, plan.Site]:
    """The sites of the plan that a layer needs, by direction; none where it has no choice."""
    if call is None:
        return {}
    needed = {"forward": call.site}
    if x.requires_grad:
        needed["dgrad"] = call.partners["dgrad"]
    if weight.requires_grad:
        needed["wgrad"] = call.partners["wgrad"]
    return needed


def _weight_on_gpu(
    op: str, x: Tensor, weight: Tensor, mask: Tensor, dense_wgrad: Tensor | None
) -> tuple[Tensor, None] | None:
    """The masked weight where there are no sparse kernels. It reads the mask itself: a captured graph follows it."""
    if mask.numel() > _MOST_MASKED or (op == "linear" and support.is_available(x.device)):
        return None
    return _Masked.apply(weight, mask, dense_wgrad), None


def _autocast_would_cast(x: Tensor, device: str) -> bool:
    """Whether torch's layers would compute in another dtype than that of x."""
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != x.dtype
