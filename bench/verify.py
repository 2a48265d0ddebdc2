"""No time without a right result: comparison with a reference before anything is timed."""

from __future__ import annotations

from torch import Tensor

TOLERANCE = 1e-5


class WrongResultError(Exception):
    """What was to be timed does not compute what it should."""


def check_close(what: str, got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise WrongResultError unless |got - expected| <= tolerance * |expected|, in Euclidean norm.

    Args:
        got, expected: the same shape; the expected one in the dtype in which to compare, e.g. float64.
    """
    if got.shape != expected.shape:
        raise WrongResultError(f"{what}: expected shape {tuple(expected.shape)}, got {tuple(got.shape)}")
    error, norm = float((got.to(expected.dtype) - expected).norm()), float(expected.norm())
    if not error <= tolerance * norm:
        raise WrongResultError(f"{what}: expected a relative error up to {tolerance:g}, got {error / (norm or 1):.2g}")


def check_zero_off(what: str, got: Tensor, mask: Tensor) -> None:
    """Raise WrongResultError unless `got` is exactly zero off the mask."""
    stray = int((got.masked_fill(mask, 0) != 0).sum())
    if stray:
        raise WrongResultError(f"{what}: expected exactly zero off the mask, got {stray} other values")
