"""Which implementation of a sparse op runs: masked dense by torch, or native sparse code; measured while they work.

Every candidate computes the right result, so measuring is letting one of them do the work and looking at the clock: it
costs what the candidate loses to the winner. That is added up, and stays below 2 % of the time since the first call,
but for calls of more than ten times the winner's time, which count as ten. Measured plans make results differ in the
last bits from run to run; all others measure nothing and give the same bits twice on a machine: "rule" (native up to a
density that each implementation names, RULE_DENSITY for convolutions on a CPU, dense above), "native", "dense", or a
file written by `save`.

Dense convolutions have two ways themselves, see cpu_backend/formats.py: a measured plan finds out which is faster,
"dense" is torch as it is, and all others take the one that is good for images of that size.

The environment variable GRANET_PLAN sets the plan to start with. Times are kept in $XDG_CACHE_HOME/granet/plan.json, or
where GRANET_PLAN_CACHE says; if that is empty, nowhere.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from granet_kernels import plan_files, plan_modes, plan_notes
from granet_kernels.cpu_backend import library
from granet_kernels.layout import SparseLayout
from granet_kernels.plan_budget import Budget
from granet_kernels.plan_modes import Mode, by_rule
from granet_kernels.plan_times import DENSE, NATIVE, NEEDED, Site, Turns
from granet_kernels.triton_backend import support

DIRECTIONS = plan_notes.DIRECTIONS
MEASURED, RULE, MODES = plan_modes.MEASURED, plan_modes.RULE, plan_modes.MODES
RULE_DENSITY = 0.5  # native up to it by the rule, and until something is measured; convolutions break even near 0.6

_PART_OF_TURNS = 0.25  # of the budget: what native code wins is more, and has to be found out first
_PERIOD = 16  # of so many calls at one density one is timed, once there is a winner or no money for the other
_PASSING = 64  # of so many calls that need no op, one takes it all the same
_RECHECK = 2048  # of so many one goes to the loser, in case it was measured at a bad moment; early on, more do
_OP_SECONDS = 1.5e-5  # that a direction's way through an op is longer than past it: 46 us for the three of a tiny layer
_SAVE_EVERY = 60.0
_MOST_SITES = 8192


@dataclass(frozen=True)
class Summary:
    """What the plan has done so far.

    Attributes:
        calls: of ops that had a choice.
        sites: different ops, directions and shapes among them.
        seconds: what measuring has cost: the time by which candidates were slower than the winner.
        share: of the wall time since the first call.
    """

    calls: int
    sites: int
    seconds: float
    share: float

    def __str__(self) -> str:
        cost = f"{self.seconds:.3f} s ({self.share:.2%})"
        return f"plan: {self.calls:,} calls at {self.sites:,} sites, measuring cost {cost}"


class Plan:
    """The choices of one process. Safe to use from several threads.

    Args:
        clock: seconds that never fall.
        default: the mode to start with.
        cache: the file of measured times, or None.

    Attributes:
        mode, set_mode, use: those of its `Mode`. What was measured is kept when another one is set.
    """

    def __init__(self, clock: Callable[[], float], default: str, cache: Path | None) -> None:
        self._clock = clock
        self._mode = Mode(default)
        self.mode, self.set_mode, self.use = self._mode.get, self._mode.set, self._mode.use
        self._cache = cache
        self._lock = threading.Lock()
        self._sites: dict[tuple[str, str], Site] = {}
        self._cached: plan_files.Entries | None = None
        self._budget = Budget(clock)
        self._saved_at = clock()
        self._unsaved = False

    def clear(self) -> None:
        """Forget all that was measured, but for the file."""
        with self._lock:
            for site in self._sites.values():
                site.forget()
            self._cached = None
            self._budget = Budget(self._clock)
            self._unsaved = False

    def site(self, key: str, rule_density: float = RULE_DENSITY) -> Site:
        """The site of a key, with the times that earlier processes measured."""
        place = (library.isa(), key)
        with self._lock:
            found = self._sites.get(place)
            if found is None:
                if len(self._sites) >= _MOST_SITES:
                    self._sites.clear()
                found = self._sites[place] = Site(key, rule_density)
        return found

    def choose(self, site: Site, layout: SparseLayout) -> tuple[str, bool]:
        """The implementation for this call, and whether to time it: then `record` has to follow."""
        mode = self.mode()
        count = site.count(layout.bucket)
        site.passed.pop(layout.bucket, None)
        if mode != MEASURED:
            return self._mode.choice(site, layout), False
        return self._choice(site, layout, count)

    def choose_together(self, sites: Sequence[Site], layout: SparseLayout) -> tuple[bool, bool]:
        """Whether the next calls at all of these sites are to run natively, and whether to time any of them.

        Such calls may be made as one, if they are counted; one that is timed needs `record_together`. It is for callers
        of whom one call is much faster: what it takes is held against dense code for all sites, never for some alone.
        """
        mode, bucket, any_timed = self.mode(), layout.bucket, False
        for site in sites:
            if mode != MEASURED:
                choice, timed = self._mode.choice(site, layout), False
            else:
                choice, timed = self._choice(site, layout, site.counts.get(bucket, 0) + 1)
            if choice != NATIVE:
                return False, False
            any_timed = any_timed or timed
        if any_timed and None in self._dense_times(sites):
            return False, False  # there is nothing to tell each site's part by
        return True, any_timed

    def agrees_on_dense(self, sites: Sequence[Site], layout: SparseLayout) -> bool:
        """Whether all of a layer's directions run densely at this density, so that no op has to be called.

        Where native code wins less than the way through the ops takes, it counts as dense. A measured plan says no now
        and then: it learns from the ops alone.
        """
        mode, bucket = self.mode(), layout.bucket
        if mode != MEASURED:
            return all(self._mode.choice(site, layout) == DENSE for site in sites)
        if sum(site.gain(bucket) for site in sites) > _OP_SECONDS * len(sites):
            return False
        passed = sites[0].passed.get(bucket, 0) + 1
        if passed >= _PASSING:
            return False  # until an op is called
        sites[0].passed[bucket] = passed
        return True

    def record(self, site: Site, layout: SparseLayout, implementation: str, seconds: float, warm: bool) -> None:
        """Take down what a timed call took.

        Args:
            warm: `is_warm` before the call. A native call that is not, and the first dense one at a site, count as
                cost, but are no samples: they prepare.
        """
        with self._lock:
            other = site.times.time(DENSE if implementation == NATIVE else NATIVE, layout.bucket)
            if other is not None and site.choices.get(layout.bucket) != implementation:
                self._budget.charge(max(0.0, seconds - other), other)
            if implementation == DENSE:
                warm, site.dense_is_warm = site.dense_is_warm, True
            if warm:
                site.times.add(implementation, layout.bucket, seconds)
                self._unsaved = True
        if self._unsaved and self._clock() - self._saved_at > _SAVE_EVERY:
            self.save_times()

    def record_together(self, sites: Sequence[Site], layout: SparseLayout, seconds: float, warm: bool) -> None:
        """Take down what one native call for several sites took: each has the part that it has of the dense time."""
        dense = [each for each in self._dense_times(sites) if each]
        if len(dense) < len(sites):  # forgotten in the meantime
            return
        for site, its in zip(sites, dense, strict=True):
            self.record(site, layout, NATIVE, seconds * its / sum(dense), warm)

    def take_turns(self, turns: Turns) -> tuple[bool, bool]:
        """Which way a dense op goes in this call, and whether to time it: then `record_turn` has to follow."""
        mode = self.mode()
        if mode != MEASURED:
            return turns.favourite and mode != DENSE, False
        if turns.winner is not None:
            return turns.winner, False
        self._budget.begin()
        way = turns.next()
        affordable = way == turns.favourite or self._budget.affords(turns.loss(), _PART_OF_TURNS)
        return (way, True) if affordable else (turns.favourite, False)

    def record_turn(self, turns: Turns, way: bool, seconds: float) -> None:
        """Take down what a timed call took."""
        with self._lock:
            best = turns.best()
            if best is not None:
                self._budget.charge(max(0.0, seconds - best), best)
            turns.add(way, seconds)

    def report(self, mask: Tensor) -> dict[str, tuple[str, float | None]]:
        """By direction, what the last call with this mask ran, and how much faster than dense; None if unknown."""
        seconds = plan_notes.last_times(mask)
        return {way: (name, dense / own if dense and own else None) for way, (name, dense, own) in seconds.items()}

    def speedup(self, mask: Tensor) -> float | None:
        """Dense time over the time of what runs, all directions together; None while one of them is unknown."""
        times = plan_notes.last_times(mask).values()
        if not times or not all(dense and own for _, dense, own in times):
            return None
        return sum(dense or 0.0 for _, dense, _ in times) / sum(own or 0.0 for _, _, own in times)

    def concerns(self, mask: Tensor) -> bool:
        """Whether ops with this mask have a choice; everywhere else, masked dense is all there is."""
        if mask.device.type == "cuda":
            return mask.dim() == 2 and support.is_available(mask.device)
        return mask.device.type == "cpu" and library.unavailable() is None

    def summary(self) -> Summary:
        """The calls, and what measuring has cost."""
        with self._lock:
            calls = [site.calls for site in self._sites.values() if site.calls]
        spent, elapsed = self._budget.spent, self._budget.elapsed()
        return Summary(sum(calls), len(calls), spent, spent / elapsed if elapsed > 0 else 0.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the choices that measuring has led to so far as a fixed plan, for set_mode, use or GRANET_PLAN.

        Whether dense code goes through channels_last is not among them: that plan converts what is large.

        Raises:
            OSError: the file cannot be written.
        """
        with self._lock:
            choices = {site.key: dict(site.choices) for site in self._sites.values() if site.choices}
        plan_files.write_choices(Path(path), choices)

    def save_times(self) -> None:
        """Write what was measured to the cache, if something was; a place that cannot be written is left alone."""
        self._saved_at = self._clock()
        if not self._unsaved or self._cache is None:
            return
        isa = library.isa()
        with self._lock:
            self._unsaved = False
            entries = {key: site.times.as_data() for (its, key), site in self._sites.items() if its == isa}
        plan_files.write_times(self._cache, {key: e for key, e in entries.items() if e[DENSE] or e[NATIVE]})

    def after_fork(self) -> None:
        """A lock that another thread of the parent held would never be released in the child."""
        self._lock = threading.Lock()

    def _set_up_measuring(self, site: Site) -> None:
        with self._lock:
            self._budget.begin()
            if self._cached is None:
                self._cached = {} if self._cache is None else plan_files.read_times(self._cache)
            entry = self._cached.pop(site.key, None)
            if entry is not None:
                site.times.load(entry)
            site.is_set_up = True

    @staticmethod
    def _dense_times(sites: Sequence[Site]) -> list[float | None]:
        return [site.times.time(DENSE, 0) for site in sites]

    def _choice(self, site: Site, layout: SparseLayout, count: int) -> tuple[str, bool]:
        """What `choose` says of a measured plan's call of this number, however often it is asked."""
        if not site.is_set_up:
            self._set_up_measuring(site)
        choice = site.current(layout.bucket)
        if choice is None or count % _PERIOD == 0:
            return self._decide(site, layout, count)
        return choice, False

    def _decide(self, site: Site, layout: SparseLayout, count: int) -> tuple[str, bool]:
        with self._lock:
            bucket = layout.bucket
            incumbent = _nearest(site.choices, bucket) or by_rule(site, layout)
            winner = site.times.winner(bucket, incumbent)
            if winner is not None:
                site.choose(bucket, winner)
                site.waiting.pop(bucket, None)
                other = DENSE if winner == NATIVE else NATIVE
                measured = site.times.samples(other, bucket) > 0
                recheck = _is_recheck(count, measured) and self._affords(site, other, winner, bucket)
                return (other if recheck else winner), True
            site.choices.pop(bucket, None)
            site.waiting.pop(bucket, None)
            if site.times.samples(incumbent, bucket) < NEEDED:
                return incumbent, True
            other = DENSE if incumbent == NATIVE else NATIVE
            if self._affords(site, other, incumbent, bucket):
                return other, True
            site.waiting[bucket] = incumbent
            return incumbent, False

    def _affords(self, site: Site, candidate: str, winner: str, bucket: int) -> bool:
        """Whether the time that a candidate may lose to the winner is within the budget."""
        expected, best = site.times.time(candidate, bucket), site.times.time(winner, bucket)
        if expected is None and candidate == NATIVE:
            expected = site.times.bounds(bucket)[0]
        loss = max(0.0, expected - best) if expected is not None and best is not None else 0.0
        return self._budget.affords(loss)


def _is_recheck(count: int, measured: bool) -> bool:
    """Whether the loser runs in this call: every 2048th, and if it was measured, the 64th, 128th, ... 1024th."""
    return count % _RECHECK == 0 or (measured and count >= 4 * _PERIOD and count & (count - 1) == 0)


def _nearest(choices: dict[int, str], bucket: int) -> str | None:
    if not choices:
        return None
    return choices[min(choices, key=lambda known: abs(known - bucket))]


_plan = Plan(time.perf_counter, os.environ.get("GRANET_PLAN") or MEASURED, plan_files.cache_path())
atexit.register(lambda: _plan.save_times())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _plan.after_fork())

mode, set_mode, use = _plan.mode, _plan.set_mode, _plan.use
site, choose, record = _plan.site, _plan.choose, _plan.record
take_turns, record_turn = _plan.take_turns, _plan.record_turn
agrees_on_dense = _plan.agrees_on_dense
choose_together, record_together = _plan.choose_together, _plan.record_together
is_warm, note, times_by_density = plan_notes.is_warm, plan_notes.note, plan_notes.times_by_density
report, speedup, concerns, summary = _plan.report, _plan.speedup, _plan.concerns, _plan.summary
save, load, clear = _plan.save, _plan.set_mode, _plan.clear
