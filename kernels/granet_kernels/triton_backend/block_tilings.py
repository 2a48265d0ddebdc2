"""How the block-sparse kernels cut their work: by kernel, by size of the blocks, and by what multiplies on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_SHARED = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED = 99
MODERN = (9, 0)


@dataclass(frozen=True)
class Tiling:
    """How a program cuts its part.

    Attributes:
        rows: of its tile: rows of the result, or for wgrad columns of x, gathered from several kept blocks.
        inner: how much of the dimension that is summed over is multiplied at once.
        warps, stages: Triton's num_warps and num_stages.
    """

    rows: int
    inner: int
    warps: int
    stages: int


Tilings = dict[int, tuple[Tiling, ...]]

MATMUL: Tilings = {
    128: (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 4), Tiling(256, 64, 8, 3), Tiling(128, 128, 8, 2)),
    64: (Tiling(256, 64, 8, 3), Tiling(128, 64, 4, 4), Tiling(128, 64, 8, 3), Tiling(128, 128, 8, 3)),
    32: (Tiling(256, 64, 8, 3), Tiling(256, 64, 4, 3), Tiling(128, 64, 4, 4), Tiling(128, 128, 4, 3)),
    16: (Tiling(256, 64, 8, 3), Tiling(256, 64, 4, 3), Tiling(128, 64, 4, 4), Tiling(128, 128, 4, 3)),
}
"""Of forward and dgrad on tensor cores; the first is the default."""

WGRAD: Tilings = {
    128: (Tiling(128, 64, 8, 3), Tiling(256, 64, 8, 3), Tiling(128, 64, 8, 4), Tiling(128, 128, 8, 2)),
    64: (Tiling(256, 64, 8, 3), Tiling(128, 64, 4, 4), Tiling(128, 64, 8, 3), Tiling(128, 128, 8, 3)),
    32: (Tiling(256, 64, 8, 3), Tiling(256, 64, 4, 3), Tiling(128, 64, 4, 4), Tiling(128, 128, 4, 3)),
    16: (Tiling(256, 64, 8, 3), Tiling(256, 64, 4, 3), Tiling(128, 64, 4, 4), Tiling(128, 128, 4, 3)),
}

FMA: Tilings = {
    128: (Tiling(128, 16, 8, 2), Tiling(128, 32, 8, 2), Tiling(64, 16, 8, 3)),
    64: (Tiling(128, 16, 4, 3), Tiling(64, 16, 4, 3), Tiling(128, 32, 4, 2)),
    32: (Tiling(128, 16, 4, 3), Tiling(128, 32, 4, 2), Tiling(256, 16, 4, 3)),
    16: (Tiling(128, 16, 4, 3), Tiling(128, 32, 4, 2), Tiling(256, 16, 4, 3)),
}
"""Of all kernels where tl.dot is done without tensor cores: IEEE float32, and chips below 8.0."""


def tilings(table: Tilings, size: int, values: Tensor, precision: str) -> tuple[Tiling, ...]:
    """Those to choose from for operands like `values`, as they fit the device; the first is the default."""
    chip = capability(values.device)
    if chip < (8, 0) or (values.dtype == torch.float32 and precision == "ieee"):
        table = FMA
    return tuple(_fitting(each, size, values.element_size(), chip) for each in table[size])


def capability(device: torch.device) -> tuple[int, int]:
    """Of the chip; MODERN for the CPU, where kernels are interpreted, or recorded to be compiled."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else MODERN


def _fitting(tiling: Tiling, size: int, itemsize: int, chip: tuple[int, int]) -> Tiling:
    """With steps of as many bytes whatever the dtype, and no more stages than shared memory has room for."""
    inner = max(16, tiling.inner * 2 // itemsize) if itemsize > 2 and tiling.inner > 32 else tiling.inner
    bytes_of_stage = (tiling.rows + size) * inner * itemsize
    room = _SHARED.get(chip, _LEAST_SHARED) * 1024 // bytes_of_stage
    return replace(tiling, inner=inner, stages=max(1, min(tiling.stages, room)))
