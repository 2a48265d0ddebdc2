"""What ran last with each mask: notes that hang on its layout, written by the ops and read by the reports."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from granet_kernels.layout import SparseLayout, density_of, known_layout
from granet_kernels.plan_times import DENSE, NATIVE, Site

DIRECTIONS = ("forward", "dgrad", "wgrad")


class Note(NamedTuple):
    """The last call of one direction with a mask.

    Attributes:
        site: of the plan.
        implementation: what ran.
        bucket: the density.
        cold: whether it ran natively, and was the first to do so at this site since the mask changed.
    """

    site: Site
    implementation: str
    bucket: int
    cold: bool


def note(site: Site, direction: str, layout: SparseLayout, implementation: str) -> None:
    """Take down what ran."""
    cold = implementation == NATIVE and site not in layout.seen
    if implementation == NATIVE:
        layout.seen.add(site)
    new, last = (site, implementation, layout.bucket, cold), layout.last
    if last.get(direction) != new:
        last[direction] = Note(*new)


def is_warm(site: Site, direction: str, layout: SparseLayout) -> bool:
    """Whether a native call now takes what native calls with this mask take.

    The first call after a change of the mask builds its index, and is not typical; unless the call before it did so
    too: where the mask changes with every call, the index is part of the cost.
    """
    if site in layout.seen:
        return True
    before = layout.last.get(direction)
    return before is not None and before.site is site and before.cold


def last_times(mask: Tensor) -> dict[str, tuple[str, float | None, float | None]]:
    """By direction: what ran last, the dense time, its own time; a time is None while it is not known."""
    layout = known_layout(mask)
    last: dict[str, Note] = {} if layout is None else layout.last
    return {
        way: (name, site.times.time(DENSE, bucket), site.times.time(name, bucket))
        for way, (site, name, bucket, _) in sorted(last.items(), key=lambda item: DIRECTIONS.index(item[0]))
    }


def times_by_density(mask: Tensor) -> tuple[float, dict[float, float]] | None:
    """Seconds of dense code, and of native code by density, where every direction that ran with this mask was measured.

    Directions are summed, masks that keep nothing left out. None while the dense time of one is not known.
    """
    layout = known_layout(mask)
    times = [] if layout is None else [note.site.times for note in layout.last.values()]
    dense = [each.time(DENSE, 0) for each in times]
    if not times or None in dense:
        return None
    buckets = set.intersection(*(each.native_buckets() for each in times))
    native = {density_of(bucket): sum(each.time(NATIVE, bucket) or 0.0 for each in times) for bucket in buckets}
    native.pop(0.0, None)
    return sum(seconds or 0.0 for seconds in dense), native
