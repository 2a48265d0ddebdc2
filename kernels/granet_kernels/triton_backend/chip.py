"""What the kernels' tilings depend on besides shapes: the capability of a device and how many processors it has.

The CPU, where kernels are interpreted, or recorded to be compiled, counts as an H200.
"""

from __future__ import annotations

import torch

MODERN = (9, 0)
_MODERN_PROCESSORS = 132


def capability(device: torch.device) -> tuple[int, int]:
    """Of the chip, major and minor."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else MODERN


def processors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    if device.type != "cuda":
        return _MODERN_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton multiplies on tensor cores there; it has left those of Volta and Turing."""
    return capability(device) >= (8, 0)


def allows_tf32() -> bool:
    """Whether torch may round the operands of float32 products. It has two ways to say so: once the new one is used,
    the old one raises."""
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
