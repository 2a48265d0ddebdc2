"""What every op computes, in plain PyTorch: the specification, and what runs where nothing faster is registered.

Sparse layers compute with W = where(mask, weight, 0), whatever stands in the weight off the mask. Layout is part of the
specification, since compiled code relies on it: a result is contiguous, except that images are channels_last when an
operand is (`is_channels_last`), and that a weight gradient has the layout of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


def linear_ref(
    x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None, dense_wgrad: Tensor | None = None
) -> Tensor:
    """x (n, in), weight and mask (out, in), bias (out,) -> x Wᵀ + bias (n, out). The flag is for backward."""
    return F.linear(x, effective_weight(weight, mask), bias)


def linear_dgrad_ref(grad: Tensor, weight: Tensor, mask: Tensor, dense_wgrad: Tensor | None = None) -> Tensor:
    """grad (n, out), weight and mask (out, in) -> grad W (n, in). The flag is for double backward."""
    return grad @ effective_weight(weight, mask)


def linear_wgrad_ref(grad: Tensor, x: Tensor, mask: Tensor, dense_wgrad: Tensor | None = None) -> Tensor:
    """grad (n, out), x (n, in), mask (out, in) -> gradᵀ x (out, in), zero off the mask unless dense_wgrad is true."""
    return on_mask(grad.t() @ x, mask, dense_wgrad)


def conv2d_ref(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_wgrad: Tensor | None = None,
) -> Tensor:
    """x (n, in, h, w), weight and mask (out, in/groups, kh, kw), bias (out,) -> x ⋆ W + bias (n, out, h', w').

    stride, padding and dilation are pairs (vertical, horizontal). The flag is for backward.
    """
    y = F.conv2d(x, effective_weight(weight, mask), bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    return y.contiguous(memory_format=image_format(x, weight))


def conv2d_dgrad_ref(
    grad: Tensor,
    weight: Tensor,
    mask: Tensor,
    x_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_wgrad: Tensor | None = None,
) -> Tensor:
    """grad (n, out, h', w'), weight and mask (out, in/groups, kh, kw) -> gradient of x, x_shape = (n, in, h, w)."""
    effective = effective_weight(weight, mask)
    x_grad = conv2d_input(list(x_shape), effective, grad, tuple(stride), tuple(padding), tuple(dilation), groups)
    return x_grad.contiguous(memory_format=image_format(grad, weight))


def conv2d_wgrad_ref(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dense_wgrad: Tensor | None = None,
) -> Tensor:
    """grad (n, out, h', w'), x (n, in, h, w) -> gradient of W (mask's shape), zero off the mask unless dense_wgrad."""
    w_grad = conv2d_weight(x, list(mask.shape), grad, tuple(stride), tuple(padding), tuple(dilation), groups)
    return on_mask(w_grad, mask, dense_wgrad)


def topk_mask_ref(scores: Tensor, counts: Tensor, offsets: Tensor, eligible: Tensor | None = None) -> Tensor:
    """scores (units,) float32, counts (S,) and offsets (S+1,) int64, eligible (units,) bool -> (units,) bool.

    True for the counts[s] highest-scored eligible units of segment s, ties to the lower index. NaN ranks above inf.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    keys = sort_keys(scores)
    bounds = offsets.tolist()
    for count, begin, end in zip(counts.tolist(), bounds[:-1], bounds[1:], strict=True):
        candidates = torch.arange(begin, end, device=scores.device)
        if eligible is not None:
            candidates = candidates[eligible[begin:end]]
        order = torch.sort(keys[candidates], descending=True, stable=True).indices
        mask[candidates[order[:count]]] = True
    return mask


def sort_keys(scores: Tensor) -> Tensor:
    """(units,) float32 -> (units,) int32 in the same order: -inf < ... < -0 == +0 < ... < inf < NaN.

    Integers, because floats are compared differently where denormals are flushed, and sorted differently by device.
    """
    bits = scores.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    keys = torch.where(bits < 0, -magnitude, magnitude)
    return torch.where(magnitude > 0x7F800000, 0x7FC00000, keys)


def effective_weight(weight: Tensor, mask: Tensor) -> Tensor:
    """where(mask, weight, 0): a selection, not a product, so that inf and NaN off the mask do no harm."""
    return torch.where(mask, weight, 0)


def on_mask(w_grad: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    """The dense gradient, zeroed off the mask unless dense_wgrad is true now, in the mask's layout."""
    if dense_wgrad is None or not dense_wgrad:
        w_grad = torch.where(mask, w_grad, 0)
    if w_grad.stride() == mask.stride():
        return w_grad
    return torch.empty_like(mask, dtype=w_grad.dtype).copy_(w_grad)


def image_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution's result: channels_last if either 4-D operand is, as F.conv2d does."""
    if is_channels_last(x) or is_channels_last(weight):
        return torch.channels_last
    return torch.contiguous_format


def is_channels_last(t: Tensor) -> bool:
    """Whether the strides of a 4-D tensor read as channels_last and not also as contiguous; ATen's rule.

    Unlike Tensor.is_contiguous it sees through slices, and does not count (n, c, 1, 1) as channels_last.
    """
    if 0 in t.shape or t.stride(1) == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if t.stride(dim) < least or (dim == 0 and least == t.stride(1)):
            return False
        least = t.stride(dim) * max(t.shape[dim], 1)
    return True
