"""How the block-sparse kernels cut their work: by the size of the blocks, and by what multiplies on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from granet_kernels.triton_backend import chip

# KiB that a program may have, by capability.
_SHARED = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_SHARED = 99


@dataclass(frozen=True)
class Tiling:
    """How a program cuts its part.

    Attributes:
        rows: of its tile: rows of the result, or for wgrad columns of x, gathered from several kept blocks.
        inner: how much of the dimension that is summed over is multiplied at once.
        warps: Triton's num_warps.
        stages: Triton's num_stages; in the tables of this file, how many steps' operands shared memory holds.
    """

    rows: int
    inner: int
    warps: int
    stages: int


Tilings = dict[int, tuple[Tiling, ...]]

TENSOR_CORES: Tilings = {
    128: (Tiling(128, 64, 8, 3), Tiling(128, 32, 8, 4), Tiling(128, 64, 8, 4), Tiling(256, 32, 8, 4)),
    64: (Tiling(256, 32, 8, 4), Tiling(256, 64, 8, 3), Tiling(128, 64, 4, 3), Tiling(128, 64, 8, 4)),
    32: (Tiling(256, 64, 8, 3), Tiling(256, 32, 8, 4), Tiling(128, 64, 4, 3), Tiling(256, 64, 4, 3)),
    16: (Tiling(256, 64, 8, 3), Tiling(256, 32, 8, 4), Tiling(128, 64, 4, 3), Tiling(256, 64, 4, 3)),
}
"""The first is the default, of which two programs fit a processor of Hopper."""

FMA: Tilings = {
    128: (Tiling(128, 16, 8, 2), Tiling(128, 32, 8, 2), Tiling(64, 16, 8, 2)),
    64: (Tiling(128, 16, 4, 2), Tiling(64, 32, 4, 2), Tiling(128, 32, 4, 2)),
    32: (Tiling(256, 16, 4, 2), Tiling(128, 16, 4, 2), Tiling(128, 32, 4, 2)),
    16: (Tiling(256, 16, 4, 2), Tiling(128, 32, 4, 2), Tiling(256, 16, 8, 2)),
}
"""Without tensor cores: IEEE float32, and chips below 8.0."""


def matmul_tilings(size: int, values: Tensor, precision: str) -> tuple[Tiling, ...]:
    """Those to choose from for forward and dgrad, as they fit the device; the first is the best for large layers.

    Args:
        values: an operand; precision: tl.dot's input_precision, of float32.
    """
    return _fitting(size, values.dtype, precision, chip.capability(values.device))


def wgrad_tilings(size: int, values: Tensor, precision: str) -> tuple[Tiling, ...]:
    """The same for wgrad, whose tiles hold whole blocks."""
    return tuple(each for each in matmul_tilings(size, values, precision) if each.rows >= size)


def enough(choices: Sequence[Tiling], programs: Callable[[Tiling], int], device: torch.device) -> Tiling:
    """The first tiling by which there are programs for all of the device's processors, or the one with most."""
    wanted = chip.processors(device)
    return next((each for each in choices if programs(each) >= wanted), min(choices, key=lambda each: each.rows))


@cache
def _fitting(size: int, dtype: torch.dtype, precision: str, on: tuple[int, int]) -> tuple[Tiling, ...]:
    """With steps of at most as many bytes as those of 16 bits, and as many stages as shared memory has room for."""
    by_fma = on < (8, 0) or (dtype == torch.float32 and precision == "ieee")
    # Hopper's tensor cores read shared memory while they multiply, so Triton has a buffer for each stage there.
    free = 0 if on[0] == 9 and not by_fma else 1
    fitting = []
    for tiling in (FMA if by_fma else TENSOR_CORES)[size]:
        inner = tiling.inner // 2 if dtype.itemsize == 4 and not by_fma else tiling.inner
        room = _SHARED.get(on, _LEAST_SHARED) * 1024 // ((tiling.rows + size) * inner * dtype.itemsize)
        fitting.append(replace(tiling, inner=inner, stages=min(tiling.stages, room) + free))
    return tuple(fitting)
