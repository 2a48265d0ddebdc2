"""Large results in memory that is used again.

The C library gives memory of some megabytes back to the system as soon as a tensor is freed, and the system hands it
out again page by page, cleared: for the results of a sparse layer that takes longer than computing them. Native ops put
theirs into the library's own pool, which keeps blocks for the next step.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from granet_kernels.cpu_backend import library

LEAST_BYTES = 1 << 20  # smaller ones the C library keeps by itself


def empty_strided(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """torch.empty_strided of float32, dense in memory in some order of the dimensions; from the pool if it is large."""
    count = math.prod(shape)
    native = library.load() if 4 * count >= LEAST_BYTES else None
    if native is None:
        return torch.empty_strided(tuple(shape), tuple(strides), dtype=torch.float32, device="cpu")
    address = native.granet_memory_take(4 * count)
    if not address:
        raise MemoryError(f"no memory for a result of shape {tuple(shape)}")
    block = _block_type(4 * count).from_address(address)
    # Given its shape in place: with a view, or an object for its storage, autograd takes it for shared, and sums
    # gradients into a new tensor where it would add to this one.
    return torch.frombuffer(block, dtype=torch.float32).as_strided_(tuple(shape), tuple(strides))


def empty(shape: Sequence[int]) -> Tensor:
    """torch.empty of float32, contiguous, from the pool if it is large."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return empty_strided(shape, strides[::-1])


def empty_like(tensor: Tensor) -> Tensor:
    """torch.empty_like in float32, from the pool if it is large and the tensor contiguous or channels_last."""
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return empty_strided(tensor.shape, tensor.stride())
    return torch.empty_like(tensor, dtype=torch.float32)


def release() -> int:
    """Give the memory that no tensor uses back to the system. Returns how many bytes that was."""
    native = library.load()
    return 0 if native is None else int(native.granet_memory_release())


@cache
def _block_type(size: int) -> Any:
    """A buffer that gives its memory back when the last tensor on it is gone."""
    give: Any = None if (native := library.load()) is None else native.granet_memory_give
    address_of = ctypes.addressof  # by a name of this call: some tensors outlive the names of the module

    def __del__(self: Any) -> None:  # noqa: N807
        give(address_of(self))

    return type("Block", (ctypes.c_char * size,), {"__del__": __del__})
