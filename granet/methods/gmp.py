"""GMP: gradual magnitude pruning, in the form that only masks and in the form that zeroes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from granet.distribution import capped_uniform_counts
from granet.methods.base import Gradual, MaskUpdate

if TYPE_CHECKING:
    from granet.topology import Layer, Topology


@dataclass(frozen=True, kw_only=True)
class GMP(Gradual):
    """Prune the smallest weights gradually; grow nothing.

    Args:
        form: "zero": a pruned weight is zero and stays zero (GraNet's baseline). "mask": pruned weights keep their
            stored value and, since every update ranks all stored values anew, may return (Zhu & Gupta; Gale et al.).
            Their gradient is masked; momentum and weight decay of the optimizer go on acting on what is stored.
        scope: "global", or "layer" with `distribution`, which is "uniform" here.
        max_sparsity: highest sparsity of single layers, by name or glob, e.g. {"conv1": 0.0, "fc": 0.8} for Gale's
            setting; needs scope "layer" and the uniform distribution.

    Source: Zhu & Gupta, arXiv:1710.01878; Gale et al., arXiv:1902.09574; GraNet, arXiv:2106.10404, section 4.
    """

    name: ClassVar[str] = "GMP"
    family: ClassVar[str] = "prune"
    source: ClassVar[str] = "arXiv:1710.01878"
    summary: ClassVar[str] = "gradual magnitude pruning, zeroing (GraNet's baseline) or mask-only (Zhu & Gupta, Gale)"

    distribution: str = "uniform"
    form: Literal["zero", "mask"] = "zero"
    max_sparsity: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("form", ("zero", "mask"))
        if self.max_sparsity and (self.scope != "layer" or self.distribution != "uniform"):
            self.reject("max_sparsity", 'nothing unless scope is "layer" and distribution is "uniform"')
        if any(not 0 <= cap <= 1 for cap in self.max_sparsity.values()):
            self.reject("max_sparsity", "sparsities in [0, 1]")

    @property
    def zeroing(self) -> bool:
        return self.form == "zero"

    def start_counts(self, layers: Sequence[Layer]) -> list[int]:
        return self._capped(layers, 0) if self.max_sparsity else super().start_counts(layers)

    def counts_at(self, layers: Sequence[Layer], step: int) -> int | list[int]:
        return self._capped(layers, step) if self.max_sparsity else super().counts_at(layers, step)

    def prune(self, topology: Topology, step: int) -> None:
        if self.form == "mask":
            topology.select(topology.magnitude(), self.counts_at(topology.layers, step))
        else:
            super().prune(topology, step)

    def as_update(self, layers: Sequence[Layer], step: int) -> MaskUpdate | None:
        if type(self) is not GMP or self.form == "mask":
            return None
        return MaskUpdate(self.keep_at(layers, lambda: [layer.kept for layer in layers], step), None)

    def _capped(self, layers: Sequence[Layer], step: int) -> list[int]:
        for pattern in self.max_sparsity:
            if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
                self.reject("max_sparsity", f"names or globs of sparse layers ({pattern!r} matches none)")
        caps = [self._cap(layer.name) for layer in layers]
        return capped_uniform_counts([layer.units for layer in layers], self.sparsity_at(step), caps)

    def _cap(self, layer: str) -> float:
        return min(
            (cap for pattern, cap in self.max_sparsity.items() if fnmatch.fnmatchcase(layer, pattern)), default=1.0
        )
