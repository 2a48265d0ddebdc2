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


def norm_ref(
    x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and residual (n, c, h, w), gamma and beta (c,) -> y (n, c, h, w), mean, invstd, var (c,).

    y = act((x - mean) * invstd * gamma + beta + residual) with act = max(., 0) if relu. mean and var are those of the
    batch, var the biased one, invstd = 1 / sqrt(var + eps).
    """
    _check_norm(x, [gamma, beta], [residual])
    mean_kept, var_kept = torch.zeros_like(gamma), torch.zeros_like(gamma)
    y, mean, invstd = torch.native_batch_norm(x, gamma, beta, mean_kept, var_kept, True, 1.0, eps)
    count = x.numel() // x.shape[1]
    if residual is not None:
        y = y.add_(residual)
    if relu:
        y = y.relu_()
    # What torch keeps at momentum 1 is the unbiased variance; asking for the variance would read x once more.
    return y.contiguous(memory_format=image_format(x, x)), mean, invstd, var_kept * ((count - 1) / count)


def norm_backward_ref(
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
    """grad, x, y (n, c, h, w), the rest (c,) -> gradients of x, gamma, beta and residual, of their shapes.

    y is given if and only if there was a residual and relu; else the gradient of the residual is empty, (0,).
    """
    _check_norm(x, [gamma, beta, mean, invstd], [grad, y])
    gated = gate(grad, x, y, gamma, beta, mean, invstd) if relu else grad
    x_grad, gamma_grad, beta_grad = torch.ops.aten.native_batch_norm_backward(
        gated, x, gamma, None, None, mean, invstd, True, eps, [True, True, True]
    )
    layout = image_format(x, x)
    residual_grad = grad.new_empty(0) if y is None else gated.contiguous(memory_format=layout)
    return x_grad.contiguous(memory_format=layout), gamma_grad, beta_grad, residual_grad


def gate(
    grad: Tensor, x: Tensor, y: Tensor | None, gamma: Tensor, beta: Tensor, mean: Tensor, invstd: Tensor
) -> Tensor:
    """The gradient before the activation max(., 0): zero where its result y is; without y, that is computed anew."""
    if y is None:
        scale = gamma * invstd
        y = torch.addcmul(_per_channel(beta - mean * scale), x, _per_channel(scale))
    return torch.where(y <= 0, 0, grad)  # NaN passes, as in torch


def norm_gradients(gated: Tensor, x: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gamma and beta from the one before the activation, by operations that autograd sees through.

    What norm_backward_ref computes, statistics included, for derivatives of a higher order.
    """
    dims, count = (0, 2, 3), x.numel() // x.shape[1]
    centred = x - x.mean(dims, keepdim=True)
    invstd = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    normal = centred * invstd
    gamma_grad, beta_grad = (gated * normal).sum(dims), gated.sum(dims)
    mean_part = (_per_channel(beta_grad) + normal * _per_channel(gamma_grad)) / count
    return _per_channel(gamma) * invstd * (gated - mean_part), gamma_grad, beta_grad


def _check_norm(x: Tensor, channels: Sequence[Tensor], images: Sequence[Tensor | None]) -> None:
    """ValueError unless `channels` are (c,) and `images` of the shape of x: torch would read beyond their ends."""
    if x.dim() != 4 or any(values.shape != x.shape[1:2] for values in channels):
        shapes = [tuple(values.shape) for values in channels]
        raise ValueError(f"norm: expected x (n, c, h, w) and values (c,), got shapes {tuple(x.shape)} and {shapes}")
    for image in images:
        if image is not None and image.shape != x.shape:
            raise ValueError(f"norm: expected images of shape {tuple(x.shape)}, got shape {tuple(image.shape)}")


def _per_channel(values: Tensor) -> Tensor:
    """(c,) -> (c, 1, 1)"""
    return values[:, None, None]


def max_pool_ref(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (n, c, h, w) -> the greatest of every 2 x 2 pixels (n, c, h // 2, w // 2), and which it was, uint8.

    0 to 3 number the four pixels row by row; NaN is above all, and of equal values it is the first.
    """
    y, index = F.max_pool2d(x, 2, return_indices=True)
    row, column = index // x.shape[3], index % x.shape[3]
    return y.contiguous(), (2 * (row % 2) + column % 2).to(torch.uint8).contiguous()


def max_pool_backward_ref(grad: Tensor, which: Tensor, h: int, w: int) -> Tensor:
    """grad and which (n, c, h // 2, w // 2) -> the gradient of x (n, c, h, w): grad where a pixel was taken, else 0."""
    x_grad = grad.new_zeros(*grad.shape[:2], h, w)
    for number in range(4):
        _every_other(x_grad, number).copy_(torch.where(which == number, grad, 0))
    return x_grad


def pick_pixels(x: Tensor, which: Tensor) -> Tensor:
    """x (n, c, h, w) -> of every 2 x 2 pixels the one that `which` names, (n, c, h // 2, w // 2)."""
    return torch.stack([torch.where(which == number, _every_other(x, number), 0) for number in range(4)]).sum(0)


def _every_other(x: Tensor, number: int) -> Tensor:
    """Pixel `number` of every 2 x 2 of x, as a view."""
    h, w = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return x[:, :, number // 2 : h : 2, number % 2 : w : 2]


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
