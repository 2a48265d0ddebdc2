"""RigL: a fixed number of weights, moved to where the gradient is largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from granet.methods.base import Exchange, MaskUpdate, Time
from granet.schedule import cosine

if TYPE_CHECKING:
    from granet.topology import Layer


@dataclass(frozen=True, kw_only=True)
class RigL(Exchange):
    """Every `update_every` steps each layer drops its smallest |w| and grows as many units of largest |gradient|.

    Args:
        drop_ratio: fraction of a layer's kept units exchanged at the start; a cosine takes it to 0 at `update_until`.
        update_until: time after which the masks stay.
        skip_step: leave all weights alone in the step of an update, as the paper does.

    Source: arXiv:1911.11134, eq. 1-2, Algorithm 1.
    """

    name: ClassVar[str] = "RigL"
    family: ClassVar[str] = "exchange"
    source: ClassVar[str] = "arXiv:1911.11134"
    summary: ClassVar[str] = "fixed sparsity; drop by magnitude, grow by gradient"

    update_every: Time = 100
    drop_ratio: float = 0.3
    update_until: Time = 0.75
    skip_step: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fraction("drop_ratio", closed=True)

    def check_times(self) -> None:
        super().check_times()
        self.resolve("update_until", least=1)

    @property
    def grows_by(self) -> str:
        return "gradient"

    @property
    def skips_step(self) -> bool:
        return self.skip_step

    @cached_property
    def _until(self) -> int:
        return self.resolve("update_until", least=1)

    def exchanges(self, step: int) -> bool:
        return super().exchanges(step) and step < self._until  # the ratio is 0 there

    def as_update(self, layers: Sequence[Layer], step: int) -> MaskUpdate | None:
        if type(self) is not RigL:
            return None
        return MaskUpdate(None, self.ratio_at(step), keep_regrown=self.keeps_regrown)

    def ratio_at(self, step: int) -> float:
        return cosine(step, self._until, self.drop_ratio, 0.0)
