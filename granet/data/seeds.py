"""Random generators that depend on what they are for, and on nothing drawn before."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(purpose: str, *numbers: int) -> int:
    """Mix a purpose and whole numbers, such as (seed, epoch, batch), into a seed in [0, 2**63).

    The first 8 bytes, little-endian and without the top bit, of the SHA-256 of "purpose:number:number:...". A hash
    keeps neighbouring seeds, epochs and batches unrelated; adding them up would repeat the same draws.
    """
    text = ":".join([purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") & (2**63 - 1)


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`. Draws are made on the CPU so that every device sees the same ones."""
    return torch.Generator().manual_seed(derive_seed(purpose, *numbers))
