"""How the kernels for unstructured masks cut their work, by dtype and chip: the one place where that is decided.

Each function returns what is worth trying, the best by arithmetic first; launchers use that unless given another. Any
of them computes the same sums, though not in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiling:
    """How a program reads rows of a panel.

    Attributes:
        parts, part: a row is so many parts of so many words; 4 neighbouring words are one load of one thread. Parts of
            16 words let 4 threads share an entry of the index, where those of 32 take 8.
        sets: 1 or 2, how many lines each thread works on. With more, entries would have to pass shared memory.
        registers: that a thread may have. Told a number, ptxas issues the loads of a round before it uses the first.
        unroll: 1 or 2 entries of each line in a round of a product; a weight gradient has one.
    """

    parts: int
    part: int
    sets: int
    registers: int
    unroll: int = 1

    @property
    def panel(self) -> int:
        """Words of a row."""
        return self.parts * self.part

    def warps(self, group: int) -> int:
        """Warps of a program for groups of so many lines."""
        return max(1, group * self.part // 4 // 32 // self.sets)


@dataclass(frozen=True)
class SampledTiling:
    """Tiles of so many outputs and inputs, over so many samples at a time, by so many warps, with so many stages."""

    outputs: int
    inputs: int
    samples: int
    warps: int
    stages: int


def product_tilings(dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Tiling, ...]:
    """Of the forward pass and the input gradient: two programs of 16 warps on a multiprocessor, 64 registers each.

    With two values in a word sums take twice the registers: there is room for one entry in a round, and on capability 7
    for one line.
    """
    is_float = dtype == torch.float32
    both = Tiling(2, 16, 2, 64, 2 if is_float else 1)
    one = Tiling(2, 16, 1, 64, 2)
    others = (
        Tiling(2, 16, 2, 96, 2),  # half as many warps, each with all its loads in flight
        Tiling(1, 32, 2, 64, 2),  # if the L1 cache does not serve two of its lines at once
        Tiling(2, 32, 2, 64, 1),  # rows of two cache lines
    )
    return (both, one, *others) if is_float or capability >= (8, 0) else (one, both, *others)


def wgrad_tilings(dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Tiling, ...]:
    """Of the weight gradient at kept positions. Long rows mean fewer sums to add across threads and to keep."""
    narrow = (Tiling(2, 16, 1, 64), Tiling(2, 16, 2, 96), Tiling(1, 32, 2, 64))
    wide = Tiling(4, 16, 1, 64)
    return (wide, *narrow) if dtype == torch.float32 and capability >= (8, 0) else narrow


def sampled_tilings(dtype: torch.dtype, capability: tuple[int, int], aligned: bool) -> tuple[SampledTiling, ...]:
    """Of the weight gradient by dense tiles. Before capability 8 Triton uses no tensor cores.

    Unless both sizes of the weight are multiples of 16 (aligned), operands are read value by value, whose addresses
    need the registers that larger tiles would take.
    """
    if not aligned:
        return (SampledTiling(64, 64, 16, 8, 2),)
    if dtype == torch.float32:
        return SampledTiling(128, 128, 16, 8, 2), SampledTiling(128, 64, 16, 8, 2)
    if capability < (8, 0):
        return (SampledTiling(64, 128, 16, 8, 2),)
    square = SampledTiling(128, 128, 64, 8, 3)
    if capability[0] in (8, 12):  # 12 has less shared memory than 9
        return square, SampledTiling(128, 128, 32, 8, 4)
    return SampledTiling(128, 256, 64, 8, 3), SampledTiling(256, 128, 64, 8, 3), square
