"""GraNet: gradual pruning with zero-cost neuroregeneration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from granet.methods.base import Exchange, Gradual, MaskUpdate
from granet.schedule import cosine
from granet_kernels.event import exchanged

if TYPE_CHECKING:
    from granet.topology import Layer


@dataclass(frozen=True, kw_only=True)
class GraNet(Gradual, Exchange):
    """Prune the smallest weights of the network gradually; in each layer exchange some for those of largest gradient.

    Args:
        regrow_ratio: neuroregeneration ratio at the start, the fraction of a layer's kept units exchanged at an update.
        final_regrow_ratio: the same at the end of the run; a cosine in between.
        regrow_until: "end" regenerates until the run ends (section 4.2 and the authors' code), "prune_end" until
            `prune_until` (Algorithm 1).
        regrown: "keep": a unit dropped and regrown in one update keeps its value and optimizer state, as in the
            authors' code; "zero": it starts again. Units that the pruning cut start again in any case.

    The exchange happens every `update_every` steps. Where `prune_until` is no multiple of it, one more pruning falls on
    `prune_until`, so that the final sparsity is exact.

    Source: arXiv:2106.10404, eq. 1-3, Algorithm 1, Table 7.
    """

    name: ClassVar[str] = "GraNet"
    family: ClassVar[str] = "prune and grow"
    source: ClassVar[str] = "arXiv:2106.10404"
    summary: ClassVar[str] = "gradual global pruning, then per-layer exchange by gradient (zero-cost neuroregeneration)"

    regrow_ratio: float = 0.5
    final_regrow_ratio: float = 0.005
    regrow_until: Literal["end", "prune_end"] = "end"
    regrown: Literal["keep", "zero"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fraction("regrow_ratio", closed=True)
        self.check_fraction("final_regrow_ratio", closed=True)
        self.check_choice("regrow_until", ("end", "prune_end"))
        self.check_choice("regrown", ("keep", "zero"))

    @property
    def grows_by(self) -> str:
        return "gradient"

    @property
    def keeps_regrown(self) -> bool:
        return self.regrown == "keep"

    def exchanges(self, step: int) -> bool:
        return super().exchanges(step) and (self.regrow_until == "end" or step <= self._end)

    def as_update(self, layers: Sequence[Layer], step: int) -> MaskUpdate | None:
        if type(self) is not GraNet:
            return None
        keep = self.keep_at(layers, lambda: [layer.kept for layer in layers], step) if self.prunes(step) else None
        ratio = self.ratio_at(step) if self.exchanges(step) else None
        return MaskUpdate(keep, ratio, round_up=True, keep_regrown=self.keeps_regrown)

    def ratio_at(self, step: int) -> float:
        return cosine(step, self._last + 1, self.regrow_ratio, self.final_regrow_ratio)

    def drop_count(self, ratio: float, kept: int) -> int:
        return exchanged(kept, ratio, round_up=True)
