"""Times of calls on a CUDA device for the plan, by events that are read when the device has passed: nothing waits.

The first calls of a site are timed one after the other, whatever the plan knows by then: the host runs ahead of the
device, and the plan hears of a time some calls later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from granet_kernels import plan
from granet_kernels.layout import SparseLayout

_MOST_PENDING = 4096  # should nothing ever ask for them, the oldest go


class _Call(NamedTuple):
    begin: torch.cuda.Event
    end: torch.cuda.Event
    site: plan.Site
    layout: SparseLayout
    implementation: str
    warm: bool


_pending: deque[_Call] = deque(maxlen=_MOST_PENDING)


def timed(run: Callable[[], Tensor], site: plan.Site, layout: SparseLayout, implementation: str, warm: bool) -> Tensor:
    """run(), between two events on the device's current stream; `plan.record` hears of it later."""
    collect()
    stream = torch.cuda.current_stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record(stream)
    result = run()
    end.record(stream)
    _pending.append(_Call(begin, end, site, layout, implementation, warm))
    return result


def collect() -> None:
    """Tell the plan of the calls that the device has ended."""
    while _pending:
        call = _pending.popleft()  # taken out before it is looked at: other threads do the same
        if not call.end.query():
            _pending.appendleft(call)
            return
        seconds = call.begin.elapsed_time(call.end) / 1000
        plan.record(call.site, call.layout, call.implementation, seconds, call.warm)
