"""Times of functions that take turns in one process, so that a slow moment of the machine meets all of them."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of single calls of one function."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return quantile(self.seconds, 0.5)

    def columns(self) -> dict[str, float]:
        """ms_median, ms_p20 and ms_p80: the middle of the times, and what 20 and 80 % of them do not exceed."""
        shares = {"ms_median": 0.5, "ms_p20": 0.2, "ms_p80": 0.8}
        return {name: 1000 * quantile(self.seconds, share) for name, share in shares.items()}


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie; linear between the two nearest, as numpy's default.

    Raises:
        ValueError: no values, or a share outside [0, 1].
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"expected one value or more and a share in [0, 1], got {len(values)} values and {share}")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class Budget:
    """A time limit for a number of cases: what one leaves over goes to the next ones.

    Args:
        seconds: for all cases; None is no limit.
        cases: how many there are.
    """

    def __init__(self, seconds: float | None, cases: int) -> None:
        self._end = math.inf if seconds is None else time.perf_counter() + seconds
        self._cases = cases

    def share(self) -> float:
        """Seconds for the next case; may be negative, since every case takes its least number of rounds."""
        left = self._end - time.perf_counter()
        share = left / max(self._cases, 1)
        self._cases -= 1
        return share


def alternate(
    candidates: Mapping[Key, Callable[[], object]],
    rounds: int,
    seconds: float = math.inf,
    warmup: Mapping[Key, int] | None = None,
    least_sample: float = 0.002,
) -> dict[Key, Timing]:
    """Call the candidates in turn and time each call.

    Every round calls each of them once, in an order of its own: whoever follows one that works on the same data finds
    it in the caches, and nobody is always that one. A call shorter than `least_sample` is repeated within its turn, and
    the turn's mean counts.

    Args:
        rounds: how many at most.
        seconds: warm-up included; no round begins after it, but LEAST_ROUNDS (or `rounds`, if fewer) are always made.
        warmup: more calls of a candidate before the first round than the one that finds how often to repeat it.
        least_sample: seconds.
    Raises:
        ValueError: rounds is not positive.
    """
    if rounds < 1:
        raise ValueError(f"expected one round or more, got {rounds}")
    begin = time.perf_counter()
    repeats = {key: _warm_up(run, (warmup or {}).get(key, 0), least_sample) for key, run in candidates.items()}
    samples: dict[Key, list[float]] = {key: [] for key in candidates}
    for index, order in enumerate(itertools.islice(orders(list(candidates)), rounds)):
        if index >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        for key in order:
            samples[key].append(_time(candidates[key], repeats[key]))
    return {key: Timing(tuple(values)) for key, values in samples.items()}


def orders(keys: Sequence[Key]) -> Iterator[list[Key]]:
    """Random orders without end, the same ones each time, none of which begins with the last one's end."""
    generator = random.Random(0)
    last: list[Key] = []
    while True:
        order = generator.sample(keys, len(keys))
        if order[:1] == last:
            order.reverse()
        last = order[-1:]
        yield order


def _warm_up(run: Callable[[], object], calls: int, least_sample: float) -> int:
    """How often to call `run` in one turn, found in `calls` + 1 calls of it."""
    for _ in range(calls):
        run()
    return max(1, min(1000, math.ceil(least_sample / max(_time(run, 1), 1e-9))))


def _time(run: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats
