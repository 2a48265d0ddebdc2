"""What the plan knows of one op on one shape: the times measured, and what follows from them at a given density."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

from granet_kernels.layout import density_of

DENSE, NATIVE = "dense", "native"

NEEDED = 3  # samples before a time counts
_WINDOW = 5  # samples kept, the latest
_MARGIN = 0.05  # a challenger must be faster by this share
_HOPELESS = 2.0  # times slower than the other: one sample is enough
_NOISE = 1.1  # what other densities say is taken with this much slack, and with _HOPELESS if it is not enough samples


class Times:
    """Seconds of the dense implementation, whatever the density, and of the native one by density bucket.

    The least of the latest samples counts, because other work on the machine only adds to a time.
    """

    def __init__(self) -> None:
        self._dense: list[float] = []
        self._native: dict[int, list[float]] = {}

    def add(self, implementation: str, bucket: int, seconds: float) -> None:
        window = self._dense if implementation == DENSE else self._native.setdefault(bucket, [])
        window.append(seconds)
        del window[:-_WINDOW]

    def samples(self, implementation: str, bucket: int) -> int:
        return len(self._window(implementation, bucket))

    def time(self, implementation: str, bucket: int) -> float | None:
        """The least sample, or None without any."""
        return min(self._window(implementation, bucket), default=None)

    def native_buckets(self) -> set[int]:
        """The densities at which native code was measured."""
        return {bucket for bucket, window in list(self._native.items()) if window}

    def bounds(self, bucket: int) -> tuple[float, float]:
        """Between what the native time at a density lies, as far as times at other densities tell.

        A time a + b * density, a and b >= 0, falls with the density, but no faster than in proportion.
        """
        density, least, most = density_of(bucket), 0.0, math.inf
        for other, window in self._native.items():
            if other == bucket:
                continue
            ratio = density / density_of(other) if density_of(other) else math.inf
            enough = len(window) >= NEEDED
            least = max(least, min(window) * min(ratio, 1) / (_NOISE if enough else _HOPELESS))
            if enough:
                most = min(most, min(window) * max(ratio, 1) * _NOISE)
        return least, most

    def winner(self, bucket: int, incumbent: str) -> str | None:
        """The faster implementation at a density, or None while that has to be measured.

        Args:
            incumbent: what runs now; it stays unless the other is faster by more than 5 %.
        """
        native, dense = self.time(NATIVE, bucket), self.time(DENSE, bucket)
        if dense is None:
            return None
        if native is None:
            return self._predicted(bucket)
        enough = {each for each in (NATIVE, DENSE) if self.samples(each, bucket) >= NEEDED}
        if len(enough) < 2:
            faster = NATIVE if native < dense else DENSE
            clear = max(native, dense) > _HOPELESS * min(native, dense)
            return faster if clear and faster in enough else None
        challenger = DENSE if incumbent == NATIVE else NATIVE
        held, offered = (native, dense) if incumbent == NATIVE else (dense, native)
        return challenger if offered < (1 - _MARGIN) * held else incumbent

    def as_data(self) -> dict[str, Any]:
        """The samples as plain data: {"dense": [s, ...], "native": {bucket: [s, ...]}}, the latest last."""
        return {
            DENSE: list(self._dense),
            NATIVE: {str(bucket): list(window) for bucket, window in self._native.items()},
        }

    def load(self, data: dict[str, Any]) -> None:
        """Take samples of `as_data` as measured here."""
        self._dense = list(data[DENSE])[-_WINDOW:]
        self._native = {int(bucket): list(window)[-_WINDOW:] for bucket, window in data[NATIVE].items() if window}

    def _predicted(self, bucket: int) -> str | None:
        if len(self._dense) < NEEDED:
            return None
        least, most = self.bounds(bucket)
        dense = min(self._dense)
        if most <= dense:
            return NATIVE
        return DENSE if least >= dense else None

    def _window(self, implementation: str, bucket: int) -> list[float]:
        return self._dense if implementation == DENSE else self._native.get(bucket, [])


class Turns:
    """Two ways to compute the same, which take turns until it is known which is faster.

    Args:
        favourite: the way to take where nothing is measured, and if the other is not faster by more than 5 %.

    Attributes:
        winner: the faster way, or None until it is known.
    """

    __slots__ = ("_calls", "_least", "favourite", "winner")

    def __init__(self, favourite: bool) -> None:
        self.favourite = favourite
        self.winner: bool | None = None
        self._calls = {False: 0, True: 0}
        self._least = {False: math.inf, True: math.inf}

    def next(self) -> bool:
        """The way that is to be timed: the favourite until there is a time to hold the other against."""
        held, offered = self._calls[self.favourite], self._calls[not self.favourite]
        return not self.favourite if held > 1 and offered < held else self.favourite

    def loss(self) -> float:
        """Seconds that the challenger takes longer, as far as is known."""
        loss = self._least[not self.favourite] - self._least[self.favourite]
        return max(0.0, loss) if math.isfinite(loss) else 0.0

    def best(self) -> float | None:
        """The least time of both ways."""
        least = min(self._least.values())
        return least if math.isfinite(least) else None

    def add(self, way: bool, seconds: float) -> None:
        """Take a time down; the first call of each way prepares, and is no sample."""
        self._calls[way] += 1
        if self._calls[way] == 1:
            return
        self._least[way] = min(self._least[way], seconds)
        held, offered = self._least[self.favourite], self._least[not self.favourite]
        if min(self._calls.values()) > NEEDED:
            self.winner = (not self.favourite) if offered < (1 - _MARGIN) * held else self.favourite
        elif offered > _HOPELESS * held and self._calls[not self.favourite] > 2:
            self.winner = self.favourite


class Site:
    """One op and direction on one geometry, with one number of threads: its times, and its choices by density bucket.

    The key names all that in plain text; it stands in the files. `rule_density` is the highest density at which the
    rule takes the native implementation. `choices` are what measuring has led to, and `gains` the seconds that native
    code saves there; `fixed` are those of a fixed plan, looked up under its `generation`. `waiting`: what runs until
    the other candidate can be afforded. `passed` counts the calls at a density that went past the op since its last
    call there. `turns`: which way dense code goes.
    """

    __slots__ = (
        "choices",
        "counts",
        "dense_is_warm",
        "fixed",
        "gains",
        "generation",
        "is_set_up",
        "key",
        "passed",
        "rule_density",
        "times",
        "turns",
        "waiting",
    )

    def __init__(self, key: str, rule_density: float) -> None:
        self.key = key
        self.rule_density = rule_density
        self.forget()

    def forget(self) -> None:
        """Be as new."""
        self.counts: dict[int, int] = {}
        self.times = Times()
        self.choices: dict[int, str] = {}
        self.gains: dict[int, float] = {}
        self.fixed: dict[int, str] = {}
        self.waiting: dict[int, str] = {}
        self.dense_is_warm = self.is_set_up = False
        self.turns: dict[Hashable, Turns] = {}
        self.generation = -1
        self.passed: dict[int, int] = {}

    def current(self, bucket: int) -> str | None:
        """What runs at a density without being asked for again, or None while every call is to decide."""
        return self.choices.get(bucket) or self.waiting.get(bucket)

    def choose(self, bucket: int, implementation: str) -> None:
        """Take what won at a density for the choice there."""
        dense, native = self.times.time(DENSE, bucket), self.times.time(NATIVE, bucket)
        self.gains[bucket] = math.inf if dense is None or native is None else dense - native
        self.choices[bucket] = implementation

    def gain(self, bucket: int) -> float:
        """Seconds that the choice at a density saves over dense code; inf while that is not known."""
        choice = self.choices.get(bucket)
        return 0.0 if choice == DENSE else math.inf if choice is None else self.gains.get(bucket, math.inf)

    @property
    def calls(self) -> int:
        return sum(list(self.counts.values()))

    def count(self, bucket: int) -> int:
        """Count a call at a density, and say the how manieth it is: layers of one shape share the site."""
        self.counts[bucket] = count = self.counts.get(bucket, 0) + 1
        return count
