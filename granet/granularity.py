"""What one unit of sparsity is: a single weight, a block, a weight of an N:M group, a filter.

A weight (out, in / groups, kh, kw) is seen as the matrix (out, in / groups * kh * kw), whatever its memory format;
units are numbered row-major over that matrix. Methods select units, never weights: scores are reduced to units, and
masks expand from units.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from granet.names import suggestion

_INF_BITS = 0x7F800000
_MAX_BITS = 0x7F7FFFFF
_SIGN_BIT = -(2**31)


class Granularity(ABC):
    """How the weights of one layer are grouped into units that are kept or dropped together."""

    @abstractmethod
    def units(self, shape: Sequence[int]) -> int:
        """Number of units of a weight of this shape.

        Raises:
            ValueError: the shape has fewer than two dimensions, an empty one, or does not fit this granularity.
        """

    @abstractmethod
    def reduce(self, values: Tensor) -> Tensor:
        """Mean of the values of each unit, accumulated in float64; units of one weight are copied.

        Args:
            values: a weight-shaped tensor of any floating dtype and memory format, e.g. |w|.
        Returns:
            (units,) float32 on the same device.
        Raises:
            ValueError: the shape does not fit this granularity.
        """

    def write_magnitude(self, values: Tensor, out: Tensor) -> None:
        """Write the mean |value| of each unit, as :meth:`reduce` computes it, to ``out``, (units,) float32."""
        out.copy_(self.reduce(values.abs()))

    @abstractmethod
    def expand(self, kept: Tensor, shape: Sequence[int]) -> Tensor:
        """The mask of the weights of a layer from that of its units.

        Args:
            kept: (units,) bool, True = kept.
            shape: the weight's shape.
        Returns:
            bool tensor of this shape, contiguous, on the device of ``kept``.
        Raises:
            ValueError: ``kept`` is not a bool tensor of (units,), or the shape does not fit.
        """

    @abstractmethod
    def contract(self, mask: Tensor) -> Tensor:
        """The inverse of :meth:`expand`: (units,) bool from a weight-shaped bool mask.

        Raises:
            ValueError: the mask is not bool, does not fit, or keeps a unit in part.
        """

    def unit_size(self, shape: Sequence[int]) -> int:
        """Number of weights in one unit of a weight of this shape; errors as for :meth:`units`."""
        return math.prod(shape) // self.units(shape)

    def capacity(self, shape: Sequence[int]) -> int:
        """The most units that a layer may keep without breaking the pattern: all of them, but for N:M."""
        return self.units(shape)

    def keep_keys(self, scores: Tensor, eligible: Tensor | None = None) -> Tensor:
        """Keys by which the units of *one* layer are selected: keeping the highest keys respects the granularity.

        Args:
            scores: (units,) float32, non-negative.
            eligible: (units,) bool, the units among which the selection is made; None means all of them.
        Returns:
            (units,) float32 keys; comparable between layers.
        """
        return scores

    def grow_keys(self, growth: Tensor, kept: Tensor) -> Tensor:
        """Keys by which dropped units of *one* layer are grown again.

        Args:
            growth: (units,) float32, non-negative, e.g. |dense gradient|.
            kept: (units,) bool, the units kept after the drop. Their keys mean nothing.
        Returns:
            (units,) float32 keys; comparable between layers.
        """
        return growth


class _SingleWeights(Granularity):
    """What the granularities with one weight a unit share."""

    def reduce(self, values: Tensor) -> Tensor:
        self.units(values.shape)
        return values.detach().to(torch.float32, copy=True).reshape(-1)

    def write_magnitude(self, values: Tensor, out: Tensor) -> None:
        torch.abs(values.detach().to(out.device, out.dtype), out=out.view(values.shape))

    def expand(self, kept: Tensor, shape: Sequence[int]) -> Tensor:
        _check_kept(kept, self, shape)
        return _copy(kept.reshape(tuple(shape)))

    def contract(self, mask: Tensor) -> Tensor:
        _check_mask(mask)
        self.units(mask.shape)
        return _copy(mask.reshape(-1))


@dataclass(frozen=True)
class Unstructured(_SingleWeights):
    """Every weight is a unit."""

    def units(self, shape: Sequence[int]) -> int:
        return math.prod(_matrix_shape(shape))

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class Block(Granularity):
    """Units are ``rows`` x ``cols`` blocks of the matrix (out, in / groups * kh * kw), numbered row-major.

    Raises:
        ValueError: rows or cols is not a positive integer.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if not (_is_positive_int(self.rows) and _is_positive_int(self.cols)):
            raise ValueError(f"expected a block of positive integers, got {self.rows!r} x {self.cols!r}")

    def units(self, shape: Sequence[int]) -> int:
        rows, cols = _matrix_shape(shape)
        if rows % self.rows or cols % self.cols:
            raise ValueError(
                f"expected a weight whose matrix is divisible into {self.rows} x {self.cols} blocks, "
                f"got {rows} x {cols} (shape {tuple(shape)})"
            )
        return (rows // self.rows) * (cols // self.cols)

    def reduce(self, values: Tensor) -> Tensor:
        return self._blocks(values.detach()).mean((1, 3), dtype=torch.float64).to(torch.float32).reshape(-1)

    def expand(self, kept: Tensor, shape: Sequence[int]) -> Tensor:
        _check_kept(kept, self, shape)
        rows, cols = _matrix_shape(shape)
        blocks = kept.reshape(rows // self.rows, 1, cols // self.cols, 1)
        return _copy(blocks.expand(-1, self.rows, -1, self.cols).reshape(tuple(shape)))

    def contract(self, mask: Tensor) -> Tensor:
        _check_mask(mask)
        blocks = self._blocks(mask)
        return _whole_units(blocks.any(3).any(1), blocks.all(3).all(1), self)

    def _blocks(self, values: Tensor) -> Tensor:
        self.units(values.shape)
        rows, cols = _matrix_shape(values.shape)
        return values.reshape(rows // self.rows, self.rows, cols // self.cols, self.cols)

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.cols}"


@dataclass(frozen=True)
class NM(_SingleWeights):
    """Units are single weights, of which ``n`` in each ``m`` consecutive ones of a row of the matrix are kept.

    The pattern is not in the mask but in the keys: they order by (is among the n best of its group, score). A selection
    of the K highest keys of a layer keeps at most n of every group when K <= n * groups, at least n when K >= n *
    groups, and exactly n:m when they are equal. So a layer can be pruned from dense to n:m in steps, and drop and grow
    on the way.

    Raises:
        ValueError: not 0 < n < m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (_is_positive_int(self.n) and _is_positive_int(self.m) and self.n < self.m):
            raise ValueError(f"expected n:m of integers with 0 < n < m, got {self.n!r}:{self.m!r}")

    def units(self, shape: Sequence[int]) -> int:
        rows, cols = _matrix_shape(shape)
        if cols % self.m:
            raise ValueError(
                f"expected a weight whose rows are divisible into groups of {self.m} for {self}, "
                f"got rows of {cols} (shape {tuple(shape)})"
            )
        return rows * cols

    def capacity(self, shape: Sequence[int]) -> int:
        return self.units(shape) // self.m * self.n

    def keep_keys(self, scores: Tensor, eligible: Tensor | None = None) -> Tensor:
        groups = self._groups(scores)
        candidates = None if eligible is None else self._groups(eligible)
        return _keys_of_two_classes(groups, _rank(groups, candidates) < self.n)

    def grow_keys(self, growth: Tensor, kept: Tensor) -> Tensor:
        groups, kept_groups = self._groups(growth), self._groups(kept)
        free = self.n - kept_groups.sum(1, keepdim=True)
        return _keys_of_two_classes(groups, _rank(groups, ~kept_groups) < free)

    def _groups(self, values: Tensor) -> Tensor:
        if values.dim() != 1 or values.numel() % self.m:
            raise ValueError(f"expected (units,) with units divisible by {self.m}, got shape {tuple(values.shape)}")
        return values.reshape(-1, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Filter(Granularity):
    """Units are the filters of a convolution, or the output neurons of a Linear: the rows of the matrix."""

    def units(self, shape: Sequence[int]) -> int:
        return _matrix_shape(shape)[0]

    def reduce(self, values: Tensor) -> Tensor:
        matrix = values.detach().reshape(_matrix_shape(values.shape))
        return matrix.mean(1, dtype=torch.float64).to(torch.float32)

    def expand(self, kept: Tensor, shape: Sequence[int]) -> Tensor:
        _check_kept(kept, self, shape)
        rows, cols = _matrix_shape(shape)
        return _copy(kept.reshape(rows, 1).expand(rows, cols).reshape(tuple(shape)))

    def contract(self, mask: Tensor) -> Tensor:
        _check_mask(mask)
        matrix = mask.reshape(_matrix_shape(mask.shape))
        return _whole_units(matrix.any(1), matrix.all(1), self)

    def __str__(self) -> str:
        return "filter"


def parse(spec: str | Granularity) -> Granularity:
    """The granularity of a text: ``unstructured``, ``block:64x32``, ``block:64`` (square), ``2:4`` or ``filter``.

    A Granularity is returned as it is; ``parse(str(g)) == g``.

    Raises:
        ValueError: the text names none, with the nearest name; or its numbers are out of range.
    """
    if isinstance(spec, Granularity):
        return spec
    text = spec.strip().lower() if isinstance(spec, str) else ""
    if text == "unstructured":
        return Unstructured()
    if text == "filter":
        return Filter()
    if match := re.fullmatch(r"block:(\d+)(?:x(\d+))?", text):
        return Block(int(match[1]), int(match[2] or match[1]))
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    hint = suggestion(text, ["unstructured", "filter", "block:64x64", "2:4"])
    raise ValueError(f"expected a granularity 'unstructured', 'block:ROWSxCOLS', 'N:M' or 'filter', got {spec!r}{hint}")


def _matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"expected a weight with two or more non-empty dimensions, got shape {tuple(shape)}")
    return shape[0], math.prod(shape[1:])


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _copy(mask: Tensor) -> Tensor:
    return mask.clone(memory_format=torch.contiguous_format)


def _check_kept(kept: Tensor, granularity: Granularity, shape: Sequence[int]) -> None:
    units = granularity.units(shape)
    if kept.dtype != torch.bool or kept.shape != (units,):
        raise ValueError(
            f"expected the kept units of shape {tuple(shape)} at {granularity} as ({units},) bool, "
            f"got {tuple(kept.shape)} {kept.dtype}"
        )


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"expected a bool mask, got {mask.dtype}")


def _whole_units(some: Tensor, every: Tensor, granularity: Granularity) -> Tensor:
    if not torch.equal(some, every):
        raise ValueError(f"expected a mask that keeps whole units of {granularity}, got units kept in part")
    return some.reshape(-1)


def _rank(groups: Tensor, candidates: Tensor | None) -> Tensor:
    """Place of each unit in its group, (groups, m) int64: candidates first, by score; ties to the lower index."""
    order = groups.argsort(dim=1, descending=True, stable=True)
    if candidates is not None:
        order = order.gather(
            1, candidates.gather(1, order).to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        )
    places = torch.arange(groups.shape[1], device=groups.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def _keys_of_two_classes(groups: Tensor, first: Tensor) -> Tensor:
    """Flat float32 keys with every unit of ``first`` above every other, both in the order of their scores.

    Non-negative floats are ordered as their bits, so the other class maps onto the negative floats by integer
    arithmetic, exactly: score 0 becomes -inf, the largest finite score the smallest negative number. Infinity and NaN
    count as the largest finite score there.
    """
    scores = groups.to(torch.float32) + 0.0  # the sum turns -0.0 into 0.0
    mirrored = _INF_BITS - scores.view(torch.int32).clamp(max=_MAX_BITS)
    return torch.where(first, scores, (mirrored | _SIGN_BIT).view(torch.float32)).reshape(-1)
