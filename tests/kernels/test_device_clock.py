"""Times by events: the plan hears of a call when the device has passed it, never before, and nothing waits."""

from __future__ import annotations

import pytest
import torch

from granet_kernels import plan
from granet_kernels.layout import layout_of
from granet_kernels.triton_backend import device_clock


class Event:
    """A CUDA event of a device whose time the test sets."""

    now = 0.0
    passed = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at = Event.now

    def query(self):
        return self.at <= Event.passed

    def elapsed_time(self, end):
        assert self.query()
        assert end.query()
        return end.at - self.at  # milliseconds, as CUDA's


@pytest.fixture
def heard(monkeypatch):
    """What the plan is told."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(device_clock, "_pending", type(device_clock._pending)(maxlen=4))
    Event.now = Event.passed = 0.0
    records = []
    monkeypatch.setattr(plan, "record", lambda *call: records.append(call))
    return records


def call(milliseconds, number=0):
    mask = torch.ones(2, 2, dtype=torch.bool)

    def run():
        Event.now += milliseconds
        return torch.tensor(number)

    return device_clock.timed(run, plan.site(f"a site {number}"), layout_of(mask), plan.NATIVE, True)


def test_the_plan_hears_of_a_call_once_the_device_has_passed_it(heard):
    assert call(3.0, 7) == 7
    assert call(4.0) == 0
    device_clock.collect()
    assert heard == []
    Event.passed = 3.0
    device_clock.collect()
    assert [(site.key, name, seconds, warm) for site, _, name, seconds, warm in heard] == [
        ("a site 7", plan.NATIVE, pytest.approx(0.003), True)
    ]
    Event.passed = 7.0
    call(1.0)
    assert len(heard) == 2
    assert heard[1][3] == pytest.approx(0.004)


def test_calls_that_nobody_asks_for_do_not_pile_up(heard):
    for _ in range(10):
        call(1.0)
    Event.passed = 100.0
    device_clock.collect()
    assert len(heard) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_of_a_cuda_device():
    mask = torch.ones(2, 2, dtype=torch.bool, device="cuda")
    site = plan.site("a site on a cuda device")
    for _ in range(3):
        device_clock.timed(
            lambda: torch.ones(1000, 1000, device="cuda") @ torch.ones(1000, 1000, device="cuda"),
            site,
            layout_of(mask),
            plan.NATIVE,
            True,
        )
    torch.cuda.synchronize()
    device_clock.collect()
    assert site.times.samples(plan.NATIVE, 0) == 3
    assert 0 < site.times.time(plan.NATIVE, 0) < 1
