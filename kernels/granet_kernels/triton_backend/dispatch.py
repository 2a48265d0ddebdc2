"""Where the ops find the Triton kernels of a CUDA device. They are imported when the first tensor of one comes by.

Triton launches on the current device, so that has to be the one of the operands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.event import update_masks_op, update_masks_parts
from granet_kernels.linear import linear_dgrad_op, linear_op, linear_wgrad_op
from granet_kernels.reference import linear_dgrad_ref, linear_ref, linear_wgrad_ref
from granet_kernels.topk import topk_mask_of_parts, topk_mask_op
from granet_kernels.triton_backend import support


@topk_mask_op.register_kernel("cuda")
def _topk_mask(
    scores: Sequence[Tensor], counts: Tensor, offsets: Tensor, eligible: Tensor | None, absolute: bool
) -> Tensor:
    if not support.is_available(scores[0].device):
        return topk_mask_of_parts(scores, counts, offsets, eligible, absolute)
    from granet_kernels.triton_backend.topk import topk_mask_triton

    with torch.cuda.device_of(scores[0]):
        return topk_mask_triton(scores, counts, offsets, eligible, absolute)


@update_masks_op.register_kernel("cuda")
def _update_masks(
    masks: Sequence[Tensor],
    weights: Sequence[Tensor],
    growth: Sequence[Tensor],
    states: Sequence[Tensor],
    owners: Sequence[int],
    fills: Sequence[float],
    keep: Sequence[int] | None,
    ratio: float | None,
    round_up: bool,
    can_grow: Sequence[bool],
    keep_regrown: bool,
) -> Tensor:
    given = masks, weights, growth, states, owners, fills, keep, ratio, round_up, can_grow, keep_regrown
    if not support.is_available(masks[0].device):
        return update_masks_parts(*given)
    from granet_kernels.triton_backend.event import update_masks_triton

    with torch.cuda.device_of(masks[0]):
        return update_masks_triton(*given)


@linear_op.register_kernel("cuda")
def _linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dense_wgrad: Tensor | None) -> Tensor:
    if not support.is_available(x.device):
        return linear_ref(x, weight, mask, bias)
    from granet_kernels.triton_backend.linear import linear_triton

    with torch.cuda.device_of(x):
        return linear_triton(x, weight, mask, bias, dense_wgrad)


@linear_dgrad_op.register_kernel("cuda")
def _linear_dgrad(grad: Tensor, weight: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    if not support.is_available(grad.device):
        return linear_dgrad_ref(grad, weight, mask)
    from granet_kernels.triton_backend.linear import linear_dgrad_triton

    with torch.cuda.device_of(grad):
        return linear_dgrad_triton(grad, weight, mask, dense_wgrad)


@linear_wgrad_op.register_kernel("cuda")
def _linear_wgrad(grad: Tensor, x: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    if not support.is_available(grad.device):
        return linear_wgrad_ref(grad, x, mask, dense_wgrad)
    from granet_kernels.triton_backend.linear import linear_wgrad_triton

    with torch.cuda.device_of(grad):
        return linear_wgrad_triton(grad, x, mask, dense_wgrad)
