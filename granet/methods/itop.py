"""ITOP: in-time over-parameterization, RigL or SET with few and large exchanges until the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from granet.methods.base import Exchange, Time
from granet.schedule import cosine
from granet_kernels.event import exchanged


@dataclass(frozen=True, kw_only=True)
class ITOP(Exchange):
    """Exchange seldom, so that new units are trained long enough to be judged, and to the end of the run.

    The Sparsifier reports R_s, the fraction of all units that were ever kept, as `exploration`.

    Args:
        growth: "gradient" (RigL-ITOP) or "random" (SET-ITOP).
        update_every: steps between exchanges; None is the paper's value for CIFAR, 4000 for gradient, 1500 for random.
        drop_ratio, final_drop_ratio: fraction of a layer's kept units exchanged at the start and at the end; a cosine.

    Source: arXiv:2102.02887, sections 3-4.
    """

    name: ClassVar[str] = "ITOP"
    family: ClassVar[str] = "exchange"
    source: ClassVar[str] = "arXiv:2102.02887"
    summary: ClassVar[str] = "RigL or SET with rare, large exchanges to the end; reports the explored fraction R_s"

    growth: Literal["gradient", "random"] = "gradient"
    update_every: Time | None = None  # type: ignore[assignment]
    drop_ratio: float = 0.5
    final_drop_ratio: float = 0.005

    def __post_init__(self) -> None:
        if self.update_every is None:
            object.__setattr__(self, "update_every", 4000 if self.growth == "gradient" else 1500)
        super().__post_init__()
        self.check_choice("growth", ("gradient", "random"))
        self.check_fraction("drop_ratio", closed=True)
        self.check_fraction("final_drop_ratio", closed=True)

    @property
    def grows_by(self) -> str:
        return self.growth

    @property
    def records_exploration(self) -> bool:
        return True

    def ratio_at(self, step: int) -> float:
        return cosine(step, self._last + 1, self.drop_ratio, self.final_drop_ratio)

    def drop_count(self, ratio: float, kept: int) -> int:
        return exchanged(kept, ratio, round_up=True)
