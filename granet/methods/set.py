"""SET: sparse evolutionary training, a fixed number of weights, regrown at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from granet.distribution import erdos_renyi_counts
from granet.methods.base import Exchange, Time

if TYPE_CHECKING:
    from granet.topology import Layer, Topology


@dataclass(frozen=True, kw_only=True)
class SET(Exchange):
    """Every `update_every` steps each layer drops a fixed fraction and grows as many units at random.

    Args:
        update_every: the paper's "1 epochs" needs steps_per_epoch; a number of steps does not.
        drop_ratio: zeta, the fraction dropped.
        drop: "magnitude" drops the smallest |w|; "signed" the smallest positive and the largest negative weights, the
            fraction of each sign, as in the paper (one weight a unit only).
        epsilon: the density of a layer is epsilon * (in + out) / (in * out), as in the paper, whatever `sparsity` says;
            None divides `sparsity` by `distribution`.

    Source: arXiv:1707.04780, eq. 1, Algorithm 1.
    """

    name: ClassVar[str] = "SET"
    family: ClassVar[str] = "exchange"
    source: ClassVar[str] = "arXiv:1707.04780"
    summary: ClassVar[str] = "fixed sparsity; drop by magnitude or by sign, grow at random"

    distribution: str = "er"
    update_every: Time = "1 epochs"
    drop_ratio: float = 0.3
    drop: Literal["magnitude", "signed"] = "magnitude"
    epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fraction("drop_ratio", closed=True)
        self.check_choice("drop", ("magnitude", "signed"))
        if self.epsilon is not None and self.epsilon <= 0:
            self.reject("epsilon", "a positive number or None")

    @property
    def grows_by(self) -> str:
        return "random"

    def start_counts(self, layers: Sequence[Layer]) -> list[int]:
        if self.epsilon is None:
            return super().start_counts(layers)
        return erdos_renyi_counts([layer.shape for layer in layers], [layer.units for layer in layers], self.epsilon)

    def ratio_at(self, step: int) -> float:
        return self.drop_ratio

    def exchange(self, topology: Topology, step: int) -> None:
        if self.drop == "magnitude":
            super().exchange(topology, step)
            return
        scores, counts = topology.signed_scores(lambda kept: self.drop_count(self.drop_ratio, kept))
        topology.exchange(scores, topology.random(), counts, keep_regrown=self.keeps_regrown)
