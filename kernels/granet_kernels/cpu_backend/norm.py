"""granet::norm and granet::norm_backward on a CPU: native code for float32 in either format, else the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from granet_kernels.cpu_backend import library, memory
from granet_kernels.norm import norm_backward_op, norm_op
from granet_kernels.reference import image_format, norm_backward_ref, norm_ref


@norm_op.register_kernel("cpu")
def _norm(
    x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    native = library.load()
    if native is None or not _is_for_library(x, [residual], [gamma, beta]):
        return norm_ref(x, gamma, beta, residual, eps, relu)
    # These names keep the copies alive, where there are any, while the library reads them.
    gamma, beta = gamma.contiguous(), beta.contiguous()
    added = None if residual is None else _in_format_of(x, residual)
    y = memory.empty_like(x)
    mean, invstd, var = (torch.empty_like(gamma) for _ in range(3))
    library.check(
        native.granet_norm_forward(
            _geometry(x, eps, relu),
            x.data_ptr(),
            None if added is None else added.data_ptr(),
            gamma.data_ptr(),
            beta.data_ptr(),
            y.data_ptr(),
            mean.data_ptr(),
            invstd.data_ptr(),
            var.data_ptr(),
            library.threads(),
        )
    )
    return y, mean, invstd, var


@norm_backward_op.register_kernel("cpu")
def _norm_backward(
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
    native = library.load()
    if native is None or not _is_for_library(x, [grad, y], [gamma, beta, mean, invstd]):
        return norm_backward_ref(grad, x, y, gamma, beta, mean, invstd, eps, relu)
    grad, out = _in_format_of(x, grad), None if y is None else _in_format_of(x, y)
    gamma, beta, mean, invstd = (values.contiguous() for values in (gamma, beta, mean, invstd))
    x_grad = memory.empty_like(x)
    gamma_grad, beta_grad = torch.empty_like(gamma), torch.empty_like(gamma)
    residual_grad = x.new_empty(0) if y is None else memory.empty_like(x)
    library.check(
        native.granet_norm_backward(
            _geometry(x, eps, relu),
            grad.data_ptr(),
            x.data_ptr(),
            None if out is None else out.data_ptr(),
            gamma.data_ptr(),
            beta.data_ptr(),
            mean.data_ptr(),
            invstd.data_ptr(),
            x_grad.data_ptr(),
            None if y is None else residual_grad.data_ptr(),
            gamma_grad.data_ptr(),
            beta_grad.data_ptr(),
            library.threads(),
        )
    )
    return x_grad, gamma_grad, beta_grad, residual_grad


def _is_for_library(x: Tensor, images: Sequence[Tensor | None], channels: Sequence[Tensor]) -> bool:
    """Whether x is dense in its format, not empty, `images` of its shape, `channels` (c,), and all of them float32."""
    return (
        x.dim() == 4
        and x.is_contiguous(memory_format=image_format(x, x))
        and x.numel() > 0
        and x.dtype == torch.float32
        and all(image is None or (image.dtype == x.dtype and image.shape == x.shape) for image in images)
        and all(values.dtype == x.dtype and values.shape == x.shape[1:2] for values in channels)
    )


def _in_format_of(x: Tensor, image: Tensor) -> Tensor:
    return image.contiguous(memory_format=image_format(x, x))


def _geometry(x: Tensor, eps: float, relu: bool) -> library.Norm:
    n, c, h, w = x.shape
    # One channel, or one pixel, lies in memory as in both formats: then the longer of the two is what a vector holds.
    channels_last = c > 1 and (h * w == 1 or image_format(x, x) == torch.channels_last)
    return library.Norm(n, c, h * w, eps, relu, channels_last)
