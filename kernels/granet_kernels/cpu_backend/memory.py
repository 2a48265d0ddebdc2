"""Large results in memory that is used again.

The C library gives memory of some megabytes back to the system as soon as a tensor is freed, and the system hands it
out again page by page, cleared: for the results of a sparse layer that takes longer than computing them. Native ops put
theirs into the library's own pool, which keeps blocks for the next step.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _from_dlpack

from granet_kernels.cpu_backend import library

LEAST_BYTES = 1 << 20  # smaller ones the C library keeps by itself

_CAPSULE = b"dltensor"  # the name that DLPack prescribes; a capsule only points to it
_new_capsule = ctypes.pythonapi["PyCapsule_New"]  # an object of its own: others may have declared theirs in other ways
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def empty_strided(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """torch.empty_strided of float32, dense in memory in some order of the dimensions; from the pool if it is large."""
    count = math.prod(shape)
    native = library.load() if 4 * count >= LEAST_BYTES else None
    if native is None:
        return torch.empty_strided(tuple(shape), tuple(strides), dtype=torch.float32, device="cpu")
    tensor = native.granet_tensor_new(*_geometry(tuple(shape), tuple(strides)))
    if not tensor:
        raise MemoryError(f"no memory for a result of shape {tuple(shape)}")
    # A tensor of DLPack's is no view and shares nothing: gradients are added to it in place.
    result: Tensor = _from_dlpack(_new_capsule(tensor, _CAPSULE, None))
    return result


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


@lru_cache(4096)
def _geometry(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, Any, Any]:
    sizes = ctypes.c_int64 * len(shape)
    return len(shape), sizes(*shape), sizes(*strides)
