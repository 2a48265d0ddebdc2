"""The contract of a method, and the two ways in which most of them change the masks: gradual pruning and exchange.

A method is a frozen description: numbers, times and how to score. It holds no tensors; the Sparsifier calls it at
every update with the Topology to change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

from granet.distribution import DISTRIBUTIONS, kept_units, layer_counts
from granet.schedule import cubic_sparsity, resolve_time
from granet_kernels.event import exchanged

if TYPE_CHECKING:
    from granet.topology import Layer, Topology

Time = int | float | str


@dataclass(frozen=True)
class MaskUpdate:
    """An update in numbers, as granet_kernels.update_masks_ takes it.

    Attributes:
        keep: units after the pruning, one number overall or one for each layer; None = no pruning.
        ratio: fraction of a layer's kept units to exchange by |gradient|; None = no exchange.
        round_up: whether the number of units exchanged is rounded up.
        keep_regrown: whether a unit dropped and regrown keeps its value and optimizer state.
    """

    keep: int | list[int] | None
    ratio: float | None
    round_up: bool = False
    keep_regrown: bool = True


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods: which masks to start with, when to change them, and how.

    Args:
        sparsity: final sparsity, the fraction of units dropped, in [0, 1).
        distribution: how the start divides the kept units among layers: "uniform", "er" or "erk".
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: needed where a time is given in epochs.

    Times are steps (1000), fractions of the run (0.5) or texts ("80 epochs", "1000 steps", "50%").
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    source: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    sparsity: float = 0.9
    distribution: str = "erk"
    total_steps: int | None = None
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        self.check_fraction("sparsity")
        if self.distribution not in DISTRIBUTIONS:
            self.reject("distribution", f"one of {', '.join(DISTRIBUTIONS)}")
        for field in ("total_steps", "steps_per_epoch"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                self.reject(field, "a positive number of steps")

    @property
    def zeroing(self) -> bool:
        """Whether the weights off the mask are zero. If not, they keep a stored value that may come back."""
        return True

    @property
    def skips_step(self) -> bool:
        """Whether the optimizer leaves all weights alone in the step of an update."""
        return False

    @property
    def grows_by(self) -> str | None:
        """What new units are chosen by: "gradient", "random", or None where no unit is ever grown."""
        return None

    @property
    def records_exploration(self) -> bool:
        """Whether the Sparsifier is to remember which units were ever kept."""
        return False

    def check_times(self) -> None:
        """Resolve every time of the run; raises ValueError where one does not fit."""
        self.resolve("total_steps")

    def sparsity_at(self, step: int) -> float:
        """Sparsity that the method aims at after `step` optimizer steps."""
        return self.sparsity

    def start_counts(self, layers: Sequence[Layer]) -> list[int]:
        """Kept units of each layer at the start; they are drawn at random."""
        return self.distribute(layers, self.sparsity_at(0))

    def distribute(self, layers: Sequence[Layer], sparsity: float) -> list[int]:
        """Kept units of each layer at this sparsity of all, by `distribution`."""
        shapes, units = [layer.shape for layer in layers], [layer.units for layer in layers]
        return layer_counts(self.distribution, shapes, units, sparsity, [layer.capacity for layer in layers])

    def prunes(self, step: int) -> bool:
        """Whether `step` ends with fewer units kept."""
        return False

    def exchanges(self, step: int) -> bool:
        """Whether `step` ends with units exchanged."""
        return False

    def is_update(self, step: int) -> bool:
        """Whether the masks change after optimizer step `step` (the first is 1)."""
        return self.prunes(step) or self.exchanges(step)

    def needs_gradient(self, step: int) -> bool:
        """Whether the dense gradient of optimizer step `step` is needed."""
        return self.grows_by == "gradient" and self.exchanges(step)

    def update(self, topology: Topology, step: int) -> None:
        """Change the masks after optimizer step `step`."""
        if self.prunes(step):
            self.prune(topology, step)
        if self.exchanges(step):
            self.exchange(topology, step)

    def as_update(self, layers: Sequence[Layer], step: int) -> MaskUpdate | None:
        """What `update` does at `step` as numbers, for one op that does all of it; None if they do not say it all.

        A class that is made from one with numbers may do something else, so these are of a class itself.
        """
        return None

    def prune(self, topology: Topology, step: int) -> None:
        """Lower the number of kept units to what `step` asks for."""
        raise NotImplementedError

    def exchange(self, topology: Topology, step: int) -> None:
        """Drop and grow units at a constant number kept."""
        raise NotImplementedError

    def reject(self, field: str, expected: str) -> None:
        raise ValueError(f"{self.name}.{field}: expected {expected}, got {getattr(self, field)!r}")

    def check_fraction(self, field: str, *, closed: bool = False) -> None:
        value = getattr(self, field)
        inside = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if not inside or (value == 1 and not closed):
            self.reject(field, "a number in [0, 1]" if closed else "a number in [0, 1)")

    def check_choice(self, field: str, choices: Sequence[str]) -> None:
        if getattr(self, field) not in choices:
            self.reject(field, " or ".join(map(repr, choices)))

    def resolve(self, field: str, least: int = 0) -> int:
        """The time in `field` as a number of steps, `least` or more."""
        if self.total_steps is None:
            raise ValueError(f"{self.name}.total_steps: expected the optimizer steps of the whole run, got None")
        steps = resolve_time(getattr(self, field), self.total_steps, self.steps_per_epoch, f"{self.name}.{field}")
        if steps < least:
            value = getattr(self, field)
            part = isinstance(value, float) or (isinstance(value, str) and value.strip().endswith("%"))
            if not part or not float(str(value).strip().rstrip("%")) > 0:
                self.reject(field, f"{least} steps or more")
            steps = least  # a part of a run too short for it
        return steps


@dataclass(frozen=True, kw_only=True)
class Periodic(Method):
    """A method whose updates are `update_every` steps apart."""

    update_every: Time = 1000

    def check_times(self) -> None:
        super().check_times()
        self.resolve("update_every", least=1)

    @cached_property
    def _every(self) -> int:
        return self.resolve("update_every", least=1)


@dataclass(frozen=True, kw_only=True)
class Gradual(Periodic):
    """Gradual pruning: the sparsity rises along a cubic from `initial_sparsity` to `sparsity`.

    Args:
        initial_sparsity: sparsity at the start; 0 is dense-to-sparse.
        update_every: steps between updates.
        prune_from: time at which the sparsity begins to rise.
        prune_until: time at which it is reached exactly, whether or not an update falls there.
        scope: "global" compares the units of all layers; "layer" gives each what `distribution` says.
    """

    initial_sparsity: float = 0.0
    prune_from: Time = 0
    prune_until: Time = 0.5
    scope: Literal["global", "layer"] = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fraction("initial_sparsity")
        if self.initial_sparsity > self.sparsity:
            self.reject("initial_sparsity", f"at most the final sparsity {self.sparsity}")
        self.check_choice("scope", ("global", "layer"))

    def check_times(self) -> None:
        super().check_times()
        if self._begin >= self._end and self.initial_sparsity != self.sparsity:
            self.reject("prune_until", f"a time after prune_from ({self.prune_from!r})")

    @cached_property
    def _begin(self) -> int:
        return self.resolve("prune_from")

    @cached_property
    def _end(self) -> int:
        return self.resolve("prune_until", least=0 if self.initial_sparsity == self.sparsity else 1)

    def sparsity_at(self, step: int) -> float:
        return cubic_sparsity(step, self._begin, self._end, self.initial_sparsity, self.sparsity)

    def prunes(self, step: int) -> bool:
        if self.initial_sparsity == self.sparsity or not self._begin < step <= self._end:
            return False
        return step % self._every == 0 or step == self._end

    def prune(self, topology: Topology, step: int) -> None:
        topology.prune(topology.magnitude(), self.keep_at(topology.layers, topology.counts, step))

    def keep_at(self, layers: Sequence[Layer], kept: Callable[[], list[int]], step: int) -> int | list[int]:
        """`counts_at`, with no layer above what it keeps now."""
        counts = self.counts_at(layers, step)
        return counts if isinstance(counts, int) else _within(counts, kept())

    def counts_at(self, layers: Sequence[Layer], step: int) -> int | list[int]:
        """Kept units after the pruning of `step`: one number for all layers together, or one for each."""
        sparsity = self.sparsity_at(step)
        if self.scope == "global":
            return kept_units(sum(layer.units for layer in layers), sparsity)
        return self.distribute(layers, sparsity)


@dataclass(frozen=True, kw_only=True)
class Exchange(Periodic):
    """Exchange: every `update_every` steps each layer drops its smallest |w| and grows as many new units."""

    @cached_property
    def _last(self) -> int:
        # Units grown by the very last step of a run would never be trained.
        return self.resolve("total_steps") - 1

    def exchanges(self, step: int) -> bool:
        return 0 < step <= self._last and step % self._every == 0

    def ratio_at(self, step: int) -> float:
        """Fraction of a layer's kept units to exchange after optimizer step `step`."""
        raise NotImplementedError

    def exchange(self, topology: Topology, step: int) -> None:
        ratio = self.ratio_at(step)
        counts = [self.drop_count(ratio, kept) for kept in topology.counts()]
        if self.grows_by == "gradient":
            growth, counts = topology.gradient(), topology.where_gradient(counts)
        else:
            growth = topology.random()
        topology.exchange(topology.magnitude(), growth, counts, keep_regrown=self.keeps_regrown)

    def drop_count(self, ratio: float, kept: int) -> int:
        """Units to exchange out of `kept`: rounded down, unless the method's authors do otherwise."""
        return exchanged(kept, ratio, round_up=False)

    @property
    def keeps_regrown(self) -> bool:
        """Whether a unit dropped and regrown in the same update keeps its value and optimizer state."""
        return True


def _within(targets: list[int], kept: list[int]) -> list[int]:
    """`targets` with none above what is kept and the same sum: pruning only takes away.

    Rounding may hand a unit to another layer from one sparsity to the next. Such a unit goes to the layer that has most
    above its target.
    """
    counts = [min(pair) for pair in zip(targets, kept, strict=True)]
    for _ in range(min(sum(targets), sum(kept)) - sum(counts)):
        spare = [have - count for have, count in zip(kept, counts, strict=True)]
        counts[spare.index(max(spare))] += 1
    return counts
