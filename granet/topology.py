"""Which units of which layers are kept, and the four ways to change that: draw, select, prune, exchange.

The units of all layers lie in one flat buffer, layer after layer, so that a selection over the whole network and one
within each layer are the same operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import granet_kernels
from granet.granularity import Granularity, Unstructured
from granet.masked import MaskedParameter
from granet.modules import SparseLayer
from granet.speed import break_even


class Layer:
    """One sparse weight: its name, its owner and, in integers, how much of it is kept.

    Attributes:
        name: of the module, or of the parameter where it is not called "weight".
        owner: the SparseLayer or MaskedParameter that computes with it.
        shape, numel: of the weight.
        units, unit_size: number of units, and weights in each.
        capacity: the most units that the granularity's pattern allows; `units`, but for N:M.
        kept: number of units kept.
    """

    def __init__(self, name: str, owner: SparseLayer | MaskedParameter) -> None:
        self.name = name
        self.owner = owner
        self.shape = tuple(self.weight.shape)
        self.numel = self.weight.numel()
        self.units = owner.granularity.units(self.shape)
        self.unit_size = owner.granularity.unit_size(self.shape)
        self.capacity = owner.granularity.capacity(self.shape)
        self.kept = self.units

    @property
    def weight(self) -> nn.Parameter:
        weight = self.owner.weight
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"layer '{self.name}': expected a plain Parameter as weight, got a parametrized one")
        return weight

    @property
    def granularity(self) -> Granularity:
        return self.owner.granularity

    @property
    def mask(self) -> Tensor:
        """Bool of the weight's shape, True = kept, on the weight's device."""
        mask = self.owner.mask
        if mask is None:
            raise ValueError(f"layer '{self.name}' is not bound to a Sparsifier")
        if mask.device != self.weight.device:
            mask = self.owner.mask = mask.to(self.weight.device)
        return mask

    @property
    def nnz(self) -> int:
        """Number of weights kept; a kept weight may be 0."""
        return self.kept * self.unit_size

    @property
    def density(self) -> float:
        return self.nnz / self.numel

    @property
    def sparsity(self) -> float:
        return 1 - self.density

    @property
    def implementation(self) -> str:
        """What computed the products of this layer last: "native", "dense", or by direction, "native/dense/native".

        The directions are forward, input gradient, weight gradient; "" before the first.
        """
        if not isinstance(self.owner, SparseLayer):
            return "dense, masked gradient"
        names = self.implementations
        if not names:
            return "" if granet_kernels.plan.concerns(self.mask) else "dense"
        return names[0] if len(set(names)) == 1 else "/".join(names)

    @property
    def implementations(self) -> list[str]:
        """The same by direction, as far as the plan had a choice."""
        if not isinstance(self.owner, SparseLayer):
            return []
        return [name for name, _ in granet_kernels.plan.report(self.mask).values()]

    @property
    def speedup(self) -> float | None:
        """Time of the dense products over that of what ran last, as measured; None while it is not known."""
        return granet_kernels.plan.speedup(self.mask) if isinstance(self.owner, SparseLayer) else None

    @property
    def break_even(self) -> float | None:
        """The smallest sparsity from which on native code is faster, by the times measured so far; None while it was
        at none of them."""
        times = granet_kernels.plan.times_by_density(self.mask) if isinstance(self.owner, SparseLayer) else None
        if times is None:
            return None
        dense, native = times
        return break_even(dense, native) if any(seconds < dense for seconds in native.values()) else None


def layer_offsets(layers: Sequence[Layer]) -> Tensor:
    """(layers + 1,) int64: where the units of each layer begin and end in a flat buffer."""
    return torch.tensor([0, *(layer.units for layer in layers)], device="cpu").cumsum(0)


@dataclass(frozen=True)
class Scores:
    """One float32 number for each unit, in one tensor of any shape for each layer; ranked by size where `absolute`.

    So the weights themselves are scores by magnitude, and no copy of them is made.
    """

    parts: Sequence[Tensor]
    absolute: bool = False


class Topology:
    """The masks of all layers in the course of one update. Changing it changes no layer; the Sparsifier applies it.

    Attributes:
        layers: as the Sparsifier holds them.
        kept: (units,) bool, the units kept. The one given at first becomes the Topology's own.
        survivors: (units,) bool, the units whose weight and optimizer state stay as they are; all others restart at 0.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        kept: Tensor,
        generator: torch.Generator,
        growth: Tensor | None = None,
        has_gradient: Sequence[bool] = (),
    ) -> None:
        self.layers = layers
        self.kept = kept
        # One tensor at first: `kept` is only ever replaced, `survivors` changed in place, and fresh memory is dear.
        self.survivors = kept
        self._offsets = layer_offsets(layers)
        self._bounds = self._offsets.tolist()
        self._generator = generator
        self._growth = growth
        self._has_gradient = has_gradient

    def counts(self) -> list[int]:
        """Units kept in each layer."""
        return torch.stack([part.count_nonzero() for part in self._split(self.kept)]).tolist()

    def magnitude(self) -> Scores:
        """Mean |w| of each unit."""
        weights = [layer.weight.detach() for layer in self.layers]
        if self._unstructured:
            return Scores([weight.to(self.kept.device, torch.float32) for weight in weights], absolute=True)
        return Scores(self._reduce([weight.abs() for weight in weights]))

    def gradient(self) -> Scores:
        """Mean |dense gradient| of each unit in the step of this update."""
        if self._growth is None:
            raise RuntimeError("the method did not ask for the dense gradient of this step (needs_gradient)")
        return self._scores(self._growth)

    def where_gradient(self, counts: list[int]) -> list[int]:
        """`counts`, with 0 for layers that took no part in this step and so have no gradient to grow by."""
        return [count if has else 0 for count, has in zip(counts, self._has_gradient, strict=True)]

    def random(self) -> Scores:
        """Uniform numbers; the same on every rank and device."""
        uniform = torch.rand(self.kept.numel(), generator=self._generator, device="cpu")
        return self._scores(uniform.to(self.kept.device))

    def signed_scores(self, drop_count: Callable[[int], int]) -> tuple[Scores, list[int]]:
        """Scores and counts by which `exchange` drops the smallest positive and the largest negative weights.

        Args:
            drop_count: how many to drop out of so many kept units of one sign. Zeros count as positive.
        """
        for layer in self.layers:
            if not isinstance(layer.granularity, Unstructured):
                raise ValueError(f"layer '{layer.name}': dropping by sign is unstructured, got {layer.granularity}")
        magnitude = self.magnitude()
        negative = torch.cat([(weight < 0).reshape(-1) for weight in magnitude.parts])
        chosen, counts = torch.zeros_like(self.kept), [0] * len(self.layers)
        for side in (self.kept & ~negative, self.kept & negative):
            drops = [drop_count(int(part.count_nonzero())) for part in self._split(side)]
            left = granet_kernels.drop(magnitude.parts, side, drops, self._offsets, absolute=True)
            chosen |= side & ~left
            counts = [a + b for a, b in zip(counts, drops, strict=True)]
        return self._scores(torch.where(chosen, 0.0, 1.0)), counts

    def draw(self, counts: Sequence[int]) -> None:
        """Keep so many units of each layer, at random, and nothing else."""
        self.select(self.random(), counts)
        self.survivors = self.kept

    def select(self, scores: Scores, counts: int | Sequence[int]) -> None:
        """Keep the highest scores among all units, kept before or not: one number overall, or one for each layer."""
        self.kept = self._topk(scores, counts, torch.ones_like(self.kept))

    def prune(self, scores: Scores, counts: int | Sequence[int]) -> None:
        """Keep the highest scores among the kept units: one number overall, or one for each layer."""
        self.kept = self._topk(scores, counts, self.kept)
        self.survivors &= self.kept

    def exchange(self, scores: Scores, growth: Scores, counts: Sequence[int], *, keep_regrown: bool) -> None:
        """In each layer drop so many units of lowest score, then grow as many of highest growth among those not kept.

        Args:
            scores, growth: of the units; non-negative unless ranked by size.
            counts: units to exchange in each layer.
            keep_regrown: whether a unit dropped here and grown again here survives.
        """
        before = self.kept
        keys = self._keep_keys(scores, before)
        dropped = granet_kernels.drop(keys, before, counts, self._offsets, absolute=scores.absolute)
        keys = self._grow_keys(growth, dropped)
        self.kept = granet_kernels.grow(keys, dropped, counts, self._offsets, absolute=growth.absolute)
        self.survivors &= before.logical_and_(self.kept) if keep_regrown else dropped

    def parts(self) -> list[tuple[Layer, Tensor, Tensor]]:
        """Each layer with its part of `kept` and of `survivors`."""
        return list(zip(self.layers, self._split(self.kept), self._split(self.survivors), strict=True))

    @property
    def _unstructured(self) -> bool:
        return all(isinstance(layer.granularity, Unstructured) for layer in self.layers)

    def _topk(self, scores: Scores, counts: int | Sequence[int], eligible: Tensor) -> Tensor:
        keys = self._keep_keys(scores, eligible)
        offsets = None if isinstance(counts, int) else self._offsets
        return granet_kernels.topk_mask(keys, counts, offsets, eligible, absolute=scores.absolute)

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [flat[begin:end] for begin, end in zip(self._bounds, self._bounds[1:], strict=False)]

    def _scores(self, flat: Tensor) -> Scores:
        return Scores(self._split(flat))

    def _reduce(self, values: Sequence[Tensor]) -> list[Tensor]:
        parts = zip(self.layers, values, strict=True)
        return [layer.granularity.reduce(value).to(self.kept.device) for layer, value in parts]

    def _keep_keys(self, scores: Scores, eligible: Tensor) -> list[Tensor]:
        parts = zip(self.layers, scores.parts, self._split(eligible), strict=True)
        return [layer.granularity.keep_keys(score, among) for layer, score, among in parts]

    def _grow_keys(self, growth: Scores, kept: Tensor) -> list[Tensor]:
        parts = zip(self.layers, growth.parts, self._split(kept), strict=True)
        return [layer.granularity.grow_keys(score, held) for layer, score, held in parts]
