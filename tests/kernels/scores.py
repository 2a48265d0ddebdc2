"""Scores of every kind on which a selection may go wrong, and counts at which it may."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def any_bits(n: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (n,)).to(torch.int32).view(torch.float32)


def special(n: int) -> Tensor:
    values = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 2.0**-149, -(2.0**-149), 3e38, 1.0]
    return torch.tensor(values)[torch.randint(len(values), (n,))]


def atoms(n: int) -> Tensor:
    """Six tenths 0, a tenth 1, and the rest just above 1."""
    place = torch.randint(10, (n,))
    return torch.where(place < 6, 0.0, torch.where(place < 7, 1.0, 1 + torch.randint(1, 5000, (n,)) * 2.0**-23))


KINDS: dict[str, Callable[[int], Tensor]] = {
    "normal": torch.randn,
    "any bits": any_bits,
    "special": special,
    "zeros": lambda n: torch.where(torch.rand(n) < 0.5, 0.0, -0.0),
    "tied": lambda n: torch.full((n,), 0.3),
    "two values": lambda n: torch.randint(2, (n,)).float(),
    "few values": lambda n: torch.randint(-3, 4, (n,)).float(),
    "half zeros": lambda n: torch.randn(n).relu(),
    "denormals": lambda n: torch.randn(n) * 2.0**-140,
    "bfloat16": lambda n: torch.randn(n).bfloat16().float(),
    "sorted": lambda n: torch.randn(n).sort().values,
    "atoms": atoms,
    "narrow": lambda n: 1 + torch.randint(5000, (n,)) * 2.0**-23,
}


def counts_worth_trying(scores: Tensor, eligible: Tensor | None) -> list[int]:
    """Counts at the ends, in between, and where the highest and the positive scores end."""
    among = scores if eligible is None else scores[eligible]
    ends = {0, 1, len(among) // 10, len(among) // 2, len(among) - 1, len(among)}
    return sorted(n for n in ends | {int((among > 0).sum()), int((among == among.max()).sum())} if 0 <= n <= len(among))
