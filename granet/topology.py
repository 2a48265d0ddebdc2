"""Which units of which layers are kept, and the four ways to change that: draw, select, prune, exchange.

The units of all layers lie in one flat buffer, layer after layer, so that a selection over the whole network and one
within each layer are the same operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import granet_kernels
from granet.granularity import Granularity, Unstructured
from granet.masked import MaskedParameter
from granet.modules import SparseLayer


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
        """What computes the products of this layer."""
        return "reference" if isinstance(self.owner, SparseLayer) else "dense, masked gradient"


def layer_offsets(layers: Sequence[Layer]) -> Tensor:
    """(layers + 1,) int64: where the units of each layer begin and end in a flat buffer."""
    return torch.tensor([0, *(layer.units for layer in layers)]).cumsum(0)


class Topology:
    """The masks of all layers in the course of one update. Changing it changes no layer; the Sparsifier applies it.

    Attributes:
        layers: as the Sparsifier holds them.
        kept: (units,) bool, the units kept.
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
        self.survivors = kept.clone()
        self._offsets = layer_offsets(layers)
        self._bounds = self._offsets.tolist()
        self._generator = generator
        self._growth = growth
        self._has_gradient = has_gradient

    def counts(self) -> list[int]:
        """Units kept in each layer."""
        return torch.stack([part.sum() for part in self._split(self.kept)]).tolist()

    def magnitude(self) -> Tensor:
        """(units,) float32: mean |w| of each unit."""
        return self._reduce(torch.abs)

    def gradient(self) -> Tensor:
        """(units,) float32: mean |dense gradient| of each unit in the step of this update."""
        if self._growth is None:
            raise RuntimeError("the method did not ask for the dense gradient of this step (needs_gradient)")
        return self._growth

    def where_gradient(self, counts: list[int]) -> list[int]:
        """`counts`, with 0 for layers that took no part in this step and so have no gradient to grow by."""
        return [count if has else 0 for count, has in zip(counts, self._has_gradient, strict=True)]

    def random(self) -> Tensor:
        """(units,) float32, uniform; the same on every rank and device."""
        return torch.rand(self.kept.numel(), generator=self._generator).to(self.kept.device)

    def signed_scores(self, drop_count: Callable[[int], int]) -> tuple[Tensor, list[int]]:
        """Scores and counts by which `exchange` drops the smallest positive and the largest negative weights.

        Args:
            drop_count: how many to drop out of so many kept units of one sign. Zeros count as positive.
        """
        for layer in self.layers:
            if not isinstance(layer.granularity, Unstructured):
                raise ValueError(f"layer '{layer.name}': dropping by sign is unstructured, got {layer.granularity}")
        magnitude, negative = self.magnitude(), self._reduce(lambda w: w.neg().clamp(min=0)) > 0
        chosen, counts = torch.zeros_like(self.kept), [0] * len(self.layers)
        for side in (self.kept & ~negative, self.kept & negative):
            drops = [drop_count(int(part.sum())) for part in self._split(side)]
            chosen |= side & ~granet_kernels.drop(magnitude, side, torch.tensor(drops), self._offsets)
            counts = [a + b for a, b in zip(counts, drops, strict=True)]
        return torch.where(chosen, 0.0, 1.0), counts

    def draw(self, counts: Sequence[int]) -> None:
        """Keep so many units of each layer, at random, and nothing else."""
        scores = self.random()
        self.kept = granet_kernels.topk_mask(
            self._keep_keys(scores, torch.ones_like(self.kept)), torch.tensor(counts), self._offsets
        )
        self.survivors = self.kept.clone()

    def select(self, scores: Tensor, counts: int | Sequence[int]) -> None:
        """Keep the highest scores among all units, kept before or not: one number overall, or one for each layer."""
        self.kept = self._topk(scores, counts, torch.ones_like(self.kept))

    def prune(self, scores: Tensor, counts: int | Sequence[int]) -> None:
        """Keep the highest scores among the kept units: one number overall, or one for each layer."""
        self.kept = self._topk(scores, counts, self.kept)
        self.survivors &= self.kept

    def exchange(self, scores: Tensor, growth: Tensor, counts: Sequence[int], *, keep_regrown: bool) -> None:
        """In each layer drop so many units of lowest score, then grow as many of highest growth among those not kept.

        Args:
            scores, growth: (units,) float32.
            counts: units to exchange in each layer.
            keep_regrown: whether a unit dropped here and grown again here survives.
        """
        before, amount = self.kept, torch.tensor(counts)
        dropped = granet_kernels.drop(self._keep_keys(scores, before), before, amount, self._offsets)
        self.kept = granet_kernels.grow(self._grow_keys(growth, dropped), dropped, amount, self._offsets)
        self.survivors &= (self.kept & before) if keep_regrown else dropped

    def parts(self) -> list[tuple[Layer, Tensor, Tensor]]:
        """Each layer with its part of `kept` and of `survivors`."""
        return list(zip(self.layers, self._split(self.kept), self._split(self.survivors), strict=True))

    def _topk(self, scores: Tensor, counts: int | Sequence[int], eligible: Tensor) -> Tensor:
        keys = self._keep_keys(scores, eligible)
        if isinstance(counts, int):
            return granet_kernels.topk_mask(keys, counts, eligible=eligible)
        return granet_kernels.topk_mask(keys, torch.tensor(counts), self._offsets, eligible=eligible)

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [flat[begin:end] for begin, end in zip(self._bounds, self._bounds[1:], strict=False)]

    def _reduce(self, score: Callable[[Tensor], Tensor]) -> Tensor:
        parts = [layer.granularity.reduce(score(layer.weight.detach())) for layer in self.layers]
        return torch.cat([part.to(self.kept.device) for part in parts])

    def _keep_keys(self, scores: Tensor, eligible: Tensor) -> Tensor:
        parts = zip(self.layers, self._split(scores), self._split(eligible), strict=True)
        return torch.cat([layer.granularity.keep_keys(score, among) for layer, score, among in parts])

    def _grow_keys(self, growth: Tensor, kept: Tensor) -> Tensor:
        parts = zip(self.layers, self._split(growth), self._split(kept), strict=True)
        return torch.cat([layer.granularity.grow_keys(score, held) for layer, score, held in parts])
