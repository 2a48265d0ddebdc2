"""granet::max_pool and granet::max_pool_backward on a CPU: native code for contiguous float32, else the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from granet_kernels.cpu_backend import library, memory
from granet_kernels.pool import max_pool_backward_op, max_pool_op
from granet_kernels.reference import max_pool_backward_ref, max_pool_ref


@max_pool_op.register_kernel("cpu")
def _max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    native = library.load()
    if native is None or x.dtype != torch.float32 or not x.is_contiguous():
        return max_pool_ref(x)
    n, c, h, w = x.shape
    y = memory.empty((n, c, h // 2, w // 2))
    which = torch.empty(y.shape, dtype=torch.uint8, device="cpu")
    library.check(
        native.granet_pool_forward(n * c, h, w, x.data_ptr(), y.data_ptr(), which.data_ptr(), library.threads())
    )
    return y, which


@max_pool_backward_op.register_kernel("cpu")
def _max_pool_backward(grad: Tensor, which: Tensor, h: int, w: int) -> Tensor:
    native = library.load()
    fits = which.dtype == torch.uint8 and which.shape == grad.shape == (*grad.shape[:2], h // 2, w // 2)
    if native is None or grad.dtype != torch.float32 or not fits:
        return max_pool_backward_ref(grad, which, h, w)
    n, c = grad.shape[:2]
    grad, which = grad.contiguous(), which.contiguous()
    x_grad = memory.empty((n, c, h, w))
    library.check(
        native.granet_pool_backward(
            n * c, h, w, grad.data_ptr(), which.data_ptr(), x_grad.data_ptr(), library.threads()
        )
    )
    return x_grad
