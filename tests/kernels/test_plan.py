"""The plan chooses the faster implementation, spends little on finding out, and remembers; by a clock made for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import types

import pytest
import torch

import granet_kernels
from granet_kernels import plan, plan_files
from granet_kernels.cpu_backend import library
from granet_kernels.layout import bucket_of, layout_of
from granet_kernels.plan import DENSE, NATIVE, Plan
from granet_kernels.plan_times import Times


class Machine:
    """Runs what a plan chooses, in time that it makes up. `dense` and `native(density)` are seconds."""

    def __init__(self, dense, native, cache=None, mode="measured", step=0.0):
        self.now, self.dense, self.native, self.step = 100.0, dense, native, step
        self.plan = Plan(lambda: self.now, mode, cache)
        self.site = self.plan.site("linear forward")
        self.ran = []

    def call(self, mask, site=None):
        site = site or self.site
        layout = layout_of(mask)
        implementation, timed = self.plan.choose(site, layout)
        warm = plan.is_warm(site, "forward", layout)
        seconds = self.dense if implementation == DENSE else self.native(layout.density)
        self.now += seconds
        if timed:
            self.plan.record(site, layout, implementation, seconds, warm)
        plan.note(site, "forward", layout, implementation)
        self.now += self.step
        self.ran.append(implementation)
        return implementation

    def settle(self, mask, calls=200):
        for _ in range(calls):
            last = self.call(mask)
        return last


def mask_of(density, numel=1000):
    mask = torch.zeros(numel // 10, 10, dtype=torch.bool)
    mask.view(-1)[: round(numel * density)] = True
    return mask


def linear_time(dense_density):
    """Native seconds that equal a dense 1 ms at this density."""
    return lambda density: 1e-4 + 9e-4 * density / dense_density


@pytest.mark.parametrize("density", [0.9, 0.5, 0.35, 0.25, 0.1, 0.01, 0])
@pytest.mark.parametrize("break_even", [0.05, 0.3, 0.8])
def test_settles_on_the_faster(density, break_even):
    machine = Machine(1e-3, linear_time(break_even))
    expected = NATIVE if density < break_even else DENSE
    assert machine.settle(mask_of(density)) == expected
    assert machine.ran[50:].count(expected) > 140


def test_the_prior_decides_before_anything_is_measured():
    machine = Machine(1e-3, lambda density: 1e-3)
    assert machine.call(mask_of(0.6)) == DENSE
    assert machine.call(mask_of(0.1)) == NATIVE


def test_equal_times_leave_the_incumbent():
    machine = Machine(1e-3, lambda density: 0.96e-3)
    assert machine.settle(mask_of(0.6)) == DENSE
    machine = Machine(0.96e-3, lambda density: 1e-3)
    assert machine.settle(mask_of(0.1)) == NATIVE


def test_the_first_call_of_a_candidate_is_no_sample():
    machine = Machine(1e-3, lambda density: 5e-4)
    mask = mask_of(0.6)
    layout, slow = layout_of(mask), 1.0
    machine.plan.choose(machine.site, layout)
    for implementation in (DENSE, NATIVE):
        machine.plan.record(machine.site, layout, implementation, slow, plan.is_warm(machine.site, "forward", layout))
        plan.note(machine.site, "forward", layout, implementation)
        assert machine.site.times.samples(implementation, layout.bucket) == 0
    assert machine.settle(mask) == NATIVE


def test_a_gradually_sparser_mask_is_explored_near_the_break_even_only():
    machine, densities = Machine(1e-3, linear_time(0.2)), [0.97**i for i in range(110)]
    losers = []
    for density in densities:
        mask = mask_of(density, 100_000)
        machine.ran.clear()
        last = machine.settle(mask, 40)
        losers.append(len([each for each in machine.ran if each != last]))
        if not 0.15 < density < 0.25:
            assert last == (NATIVE if density < 0.2 else DENSE), density
    explored = [density for density, count in zip(densities, losers, strict=True) if count > 1]  # one is a recheck
    assert sum(losers) < 45  # of 4400; most are rechecks, of which each of 29 buckets has up to two
    assert min(explored) > 0.1
    assert machine.plan.summary().share < 0.03


def test_a_hopeless_candidate_gets_two_calls():
    machine = Machine(1e-3, lambda density: 0.05)
    machine.settle(mask_of(0.6), 60)
    assert machine.ran.count(NATIVE) == 2  # one to warm up


def test_measuring_costs_two_per_cent_at_most_beyond_the_allowance():
    machine, masks = Machine(1e-3, lambda density: 0.01, step=1e-3), [mask_of(0.6) for _ in range(200)]
    for turn in range(100):
        for i, mask in enumerate(masks):  # every mask at a site of its own: 200 times two slow calls wanted
            machine.call(mask, machine.plan.site(f"linear {i}"))
        spent, elapsed = machine.plan.summary().seconds, machine.now - 100.0
        assert spent <= 0.2 + 0.02 * elapsed + 0.05, turn
    assert machine.plan.summary().share < 0.03


def test_what_runs_while_the_other_cannot_be_afforded(tmp_path):
    machine, mask = Machine(1.0, lambda density: 0.2), mask_of(0.1)
    layout = layout_of(mask)
    machine.settle(mask, 8)
    assert machine.site.waiting == {layout.bucket: NATIVE}
    assert machine.plan.choose_together([machine.site], layout) == (True, False)
    assert not machine.plan.agrees_on_dense([machine.site], layout)
    machine.plan.save(tmp_path / "plan.json")
    assert plan_files.read_choices(tmp_path / "plan.json") == {}
    machine.now += 1000
    machine.ran.clear()
    machine.settle(mask, 24)
    assert DENSE in machine.ran[:16]
    assert (machine.site.waiting, machine.site.choices) == ({}, {layout.bucket: NATIVE})
    machine = Machine(1.0, lambda density: 0.2)
    machine.settle(mask, 8)
    machine.plan.clear()
    assert machine.site.waiting == {}


def test_the_cost_is_what_the_slower_took_longer():
    machine = Machine(1e-3, lambda density: 3e-3)
    machine.settle(mask_of(0.6))
    native = machine.ran.count(NATIVE)
    assert native > 0
    assert machine.plan.summary().seconds == pytest.approx(native * 2e-3)
    assert machine.plan.summary().calls == 200
    assert "200 calls at 1 sites" in str(machine.plan.summary())


def test_a_winner_that_becomes_slow_is_noticed():
    machine, mask = Machine(1e-3, lambda density: 5e-4), mask_of(0.1)
    assert machine.settle(mask) == NATIVE
    machine.native = lambda density: 2e-3
    assert machine.settle(mask) == DENSE


def test_a_loser_that_becomes_fast_is_noticed():
    machine, mask = Machine(1e-3, lambda density: 2e-3), mask_of(0.6)
    assert machine.settle(mask) == DENSE
    machine.native = lambda density: 1e-4
    assert machine.settle(mask, 5000) == NATIVE


def test_a_loser_measured_at_a_bad_moment_gets_another_chance_soon():
    machine, mask = Machine(1e-3, lambda density: 5e-3), mask_of(0.6)
    assert machine.settle(mask, 30) == DENSE
    machine.native = lambda density: 1e-4
    assert machine.settle(mask, 60) == NATIVE


def test_dense_times_serve_all_densities():
    machine = Machine(1e-3, linear_time(0.2))
    machine.settle(mask_of(0.6))
    assert machine.site.times.samples(DENSE, bucket_of(0.01)) >= 3


def test_times_at_other_densities_bound_the_native_time():
    times = Times()
    for seconds in (3.0, 2.0, 4.0):
        times.add(NATIVE, bucket_of(0.5), seconds)
    least, most = times.bounds(bucket_of(0.25))
    assert least == pytest.approx(1.0 / 1.1)
    assert most == pytest.approx(2.0 * 1.1)
    least, most = times.bounds(bucket_of(1))
    assert least == pytest.approx(2.0 / 1.1)
    assert most == pytest.approx(4.0 * 1.1)


@pytest.mark.parametrize("layers", [1, 2, 4, 8])
def test_layers_that_share_a_site_all_follow_a_change(layers):
    machine, masks = Machine(1e-3, lambda density: 5e-4), [mask_of(0.3 * 0.8**i) for i in range(layers)]
    for _ in range(200):
        assert len({layout_of(mask).bucket for mask in masks}) == layers
        for mask in masks:
            machine.call(mask)
    assert [machine.call(mask) for mask in masks] == [NATIVE] * layers
    machine.native = lambda density: 2.5e-3
    for _ in range(200):
        for mask in masks:
            machine.call(mask)
    assert [machine.call(mask) for mask in masks] == [DENSE] * layers


@pytest.mark.parametrize("every", [1, 2, 3, 7, 50])
def test_masks_that_change_often_are_measured_too(every):
    machine, mask = Machine(1e-3, lambda density: 5e-3), mask_of(0.1)
    for i in range(300):
        if i % every == 0:
            mask[-1 - i % 50] ^= True
        machine.call(mask)
    assert machine.ran[-50:].count(DENSE) > 45


def test_an_index_built_for_every_call_is_part_of_the_time():
    machine, mask = Machine(1e-3, lambda density: 1e-3), mask_of(0.1)
    site = machine.site
    assert not plan.is_warm(site, "forward", layout_of(mask))
    plan.note(site, "forward", layout_of(mask), NATIVE)
    assert plan.is_warm(site, "forward", layout_of(mask))
    mask[-1, -1] ^= True
    assert plan.is_warm(site, "forward", layout_of(mask))  # the call before was cold too
    assert not plan.is_warm(site, "dgrad", layout_of(mask))
    plan.note(site, "forward", layout_of(mask), NATIVE)
    plan.note(site, "forward", layout_of(mask), NATIVE)
    mask[-1, -1] ^= True
    assert not plan.is_warm(site, "forward", layout_of(mask))


def test_a_stall_counts_as_ten_times_the_winner():
    machine, mask = Machine(1e-3, lambda density: 5e-4), mask_of(0.6)
    for _ in range(4):
        machine.call(mask)
    machine.native = lambda density: 30.0
    while machine.ran.count(NATIVE) == 0:
        machine.call(mask)
    assert machine.plan.summary().seconds == pytest.approx(30 - 1e-3)
    machine.now -= 30  # the elapsed time of the stall itself would pay for it
    machine.native = lambda density: 5e-4
    assert machine.settle(mask) == NATIVE


def test_calls_that_may_be_made_as_one():
    """They are native; one that is due to be timed has the others timed with it."""
    machine = Machine(1e-3, lambda density: density * 1e-3)
    mask, other = mask_of(0.1), machine.plan.site("linear wgrad")
    layout, sites = layout_of(mask), (machine.site, other)
    assert machine.plan.choose_together(sites, layout) == (False, False)  # no dense time is known
    machine.settle(mask)
    assert machine.plan.choose_together(sites, layout) == (False, False)
    for _ in range(200):
        machine.call(mask, other)
    for _ in range(7):
        assert machine.plan.choose_together(sites, layout) == (True, False)
        assert other.count(layout.bucket) == machine.site.counts[layout.bucket] + 1
        machine.site.count(layout.bucket)
    assert machine.plan.choose_together(sites, layout) == (True, True)  # the 208th
    other.count(layout.bucket)
    assert machine.plan.choose_together(sites, layout) == (True, True)
    machine.site.count(layout.bucket)
    assert machine.plan.choose_together(sites, layout) == (True, False)


def with_dense_times(machine, mask, dense):
    """Sites that are dense so far, and have been measured."""
    sites = machine.site, machine.plan.site("linear wgrad")
    for site, seconds in zip(sites, dense, strict=True):
        for _ in range(4):
            machine.plan.choose(site, layout_of(mask))
            machine.plan.record(site, layout_of(mask), DENSE, seconds, True)
    return sites


@pytest.mark.parametrize("together", [3e-3, 5e-3])
def test_a_call_for_two_sites_is_held_against_both_dense_ones(together):
    machine, mask = Machine(1e-3, lambda density: 1e-3), mask_of(0.6)
    layout, sites = layout_of(mask), with_dense_times(machine, mask, (1e-3, 3e-3))
    assert machine.plan.choose_together(sites, layout) == (True, True)
    for _ in range(3):
        machine.plan.record_together(sites, layout, together, True)
    times = [site.times.time(NATIVE, layout.bucket) for site in sites]
    assert times == pytest.approx([together / 4, together * 3 / 4])
    assert machine.plan.choose_together(sites, layout)[0] == (together < 4e-3)
    assert {machine.plan.choose(site, layout)[0] for site in sites} == {NATIVE if together < 4e-3 else DENSE}


def test_a_call_for_two_sites_that_prepares_is_no_sample():
    machine, mask = Machine(1e-3, lambda density: 1e-3), mask_of(0.6)
    layout, sites = layout_of(mask), with_dense_times(machine, mask, (1e-3, 3e-3))
    machine.plan.record_together(sites, layout, 9e-3, False)
    assert [site.times.time(NATIVE, layout.bucket) for site in sites] == [None, None]
    assert machine.plan.summary().seconds == pytest.approx(5e-3)
    machine.plan.clear()
    machine.plan.record_together(sites, layout, 9e-3, True)  # what its parts are is forgotten
    assert [site.times.time(NATIVE, layout.bucket) for site in sites] == [None, None]


@pytest.mark.parametrize("saved", [2e-5, 4e-5])
def test_native_code_has_to_win_more_than_the_way_through_an_op(saved):
    """A layer's directions count together: 15 us each."""
    machine = Machine(1e-4, lambda density: 1e-4 - saved)
    mask, other = mask_of(0.1), machine.plan.site("linear wgrad")
    layout, sites = layout_of(mask), (machine.site, other)
    assert not machine.plan.agrees_on_dense(sites, layout)  # nothing is known
    machine.settle(mask)
    assert machine.site.choices[layout.bucket] == NATIVE
    assert not machine.plan.agrees_on_dense(sites, layout)  # the other is not known
    machine.native = lambda density: 2e-4
    for _ in range(200):
        machine.call(mask, other)
    assert other.choices[layout.bucket] == DENSE
    assert machine.plan.agrees_on_dense(sites, layout) == (saved < 2 * 1.5e-5)


def test_a_layer_that_goes_past_the_op_calls_it_now_and_then():
    machine = Machine(1e-4, lambda density: 1e-3 if density > 0.1 else 1e-5)
    mask, other = mask_of(0.5), mask_of(0.01)  # the other layer of the same shape calls the op in every step
    layout = layout_of(mask)
    assert (machine.settle(mask), machine.settle(other)) == (DENSE, NATIVE)
    for _ in range(2):
        answers = []
        for _ in range(65):
            answers.append(machine.plan.agrees_on_dense([machine.site], layout))
            machine.call(other)
        assert answers == [True] * 63 + [False] * 2
        machine.call(mask)


@pytest.mark.parametrize("mode", ["rule", NATIVE, DENSE])
def test_fixed_modes_need_no_choice(mode):
    machine = Machine(1e-3, lambda density: 1e-3, mode=mode)
    found = [machine.plan.choose_together([machine.site], layout_of(mask_of(density))) for density in (0.9, 0.1)]
    native = {"rule": [False, True], NATIVE: [True, True], DENSE: [False, False]}[mode]
    assert found == [(each, False) for each in native]


@pytest.mark.parametrize("mode", ["rule", NATIVE, DENSE])
def test_fixed_modes_measure_nothing(mode):
    machine = Machine(1e-3, lambda density: 1e-3, mode=mode)
    for density in (0.9, 0.1):
        machine.settle(mask_of(density))
    assert set(machine.ran) == ({NATIVE, DENSE} if mode == "rule" else {mode})
    assert machine.plan.summary().seconds == 0
    assert machine.site.times.as_data() == {"dense": [], "native": {}}
    assert machine.site.choices == {}


def test_an_implementation_names_the_density_of_its_rule():
    machine = Machine(1e-3, lambda density: 1.0, mode="rule")
    site = machine.plan.site("another", rule_density=0.1)
    assert [machine.call(mask_of(density), site) for density in (0.05, 0.1, 0.11, 0.5)] == [
        NATIVE,
        NATIVE,
        DENSE,
        DENSE,
    ]


@pytest.mark.parametrize("available", [True, False])
def test_masks_on_a_gpu_concern_the_plan_where_its_kernels_run(available, monkeypatch):
    """Those of linear layers; convolutions have no kernels there."""
    monkeypatch.setattr(plan.support, "is_available", lambda device: available)
    linear, conv2d = (types.SimpleNamespace(device=torch.device("cuda"), dim=lambda n=n: n) for n in (2, 4))
    assert plan.concerns(linear) is available
    assert not plan.concerns(conv2d)


def test_the_rule_is_native_up_to_a_density():
    machine = Machine(1e-3, lambda density: 1.0, mode="rule")
    ran = [machine.call(mask_of(density)) for density in (0, 0.1, 0.5, 0.51, 1)]
    assert ran == [NATIVE, NATIVE, NATIVE, DENSE, DENSE]


@pytest.mark.parametrize("mode", ["rule", NATIVE, DENSE])
def test_a_fixed_mode_in_between_loses_nothing(mode, tmp_path):
    machine, mask = Machine(1e-3, lambda density: 0.97e-3), mask_of(0.6)  # within the margin: the incumbent stays
    machine.settle(mask)
    calls, choices = machine.plan.summary(), dict(machine.site.choices)
    with machine.plan.use(mode):
        machine.settle(mask, 5)
        machine.plan.save(tmp_path / "plan.json")
    assert choices == machine.site.choices == {bucket_of(0.6): DENSE}
    assert plan_files.read_choices(tmp_path / "plan.json") == {machine.site.key: choices}
    assert machine.call(mask) == DENSE
    assert machine.plan.summary().seconds == calls.seconds


def test_use_restores_the_mode_and_sites_follow():
    machine, mask = Machine(1e-3, lambda density: 5e-4), mask_of(0.6)
    machine.settle(mask)
    with machine.plan.use("dense"):
        assert machine.plan.mode() == "dense"
        assert machine.call(mask) == DENSE
    assert machine.plan.mode() == "measured"
    assert machine.call(mask) == NATIVE


def test_a_saved_plan_is_followed_and_nothing_is_measured(tmp_path):
    machine = Machine(1e-3, linear_time(0.7))
    for density in (0.8, 0.6, 0.1):
        machine.settle(mask_of(density))
    machine.plan.save(tmp_path / "plan.json")

    other = Machine(1e-3, lambda density: 1.0, mode=str(tmp_path / "plan.json"))
    assert other.settle(mask_of(0.8)) == DENSE
    assert other.settle(mask_of(0.6)) == NATIVE
    assert other.settle(mask_of(0.52)) == NATIVE  # between two buckets where native won, and above the prior
    assert other.settle(mask_of(1)) == DENSE
    assert other.plan.summary().seconds == 0
    unknown = other.plan.site("linear backward")
    assert [other.call(mask_of(density), unknown) for density in (0.6, 0.2)] == [DENSE, NATIVE]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": 1}', '{"format": 9, "choices": {}}', '{"format": 1, "choices": {"a": {"3": "x"}}}'],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    machine = Machine(1e-3, lambda density: 1e-3)
    with pytest.raises(ValueError, match=r"expected a plan as plan\.save writes it, got .*plan\.json"):
        machine.plan.set_mode(tmp_path / "plan.json")
    assert machine.plan.mode() == "measured"


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"plan: expected measured, rule, native, dense or a file .*, got 'sparse'"):
        plan.set_mode("sparse")


def test_what_was_measured_is_read_by_the_next_process(tmp_path):
    cache = tmp_path / "new" / "plan.json"
    first = Machine(1e-3, lambda density: 5e-4, cache)
    first.settle(mask_of(0.6))
    first.plan.save_times()
    second = Machine(1e-3, lambda density: 5e-4, cache)
    assert second.settle(mask_of(0.6), 20) == NATIVE
    assert set(second.ran) == {NATIVE}
    assert second.plan.summary().seconds == 0


@pytest.mark.parametrize(("native", "density"), [(3e-3, 0.6), (1e-3 / 3, 0.1)])
def test_a_hopeless_loser_is_not_tried_by_the_next_process(native, density, tmp_path):
    cache = tmp_path / "plan.json"
    first = Machine(1e-3, lambda density: native, cache)
    winner = first.settle(mask_of(density), 30)
    first.plan.save_times()
    second = Machine(1e-3, lambda density: native, cache)
    second.settle(mask_of(density), 30)
    assert set(second.ran) == {winner}
    assert len(set(first.ran)) == 2


def test_the_cache_keeps_what_others_wrote(tmp_path):
    cache = tmp_path / "plan.json"
    machines = [Machine(1e-3, lambda density: 5e-4, cache) for _ in range(2)]
    for name, machine in zip("ab", machines, strict=True):
        machine.site = machine.plan.site(name)
        machine.settle(mask_of(0.6))
    for machine in machines:
        machine.plan.save_times()
    data = json.loads(cache.read_text())
    data["machines"]["another"] = {"c": {"dense": [1.0], "native": {}}}
    cache.write_text(json.dumps(data))
    machines[0].settle(mask_of(0.6))
    machines[0].plan.save_times()
    data = json.loads(cache.read_text())
    assert set(data["machines"][plan_files.machine()]) == {"a", "b"}
    assert "another" in data["machines"]
    assert os.listdir(tmp_path) == ["plan.json"]


def test_another_build_of_the_kernels_has_times_of_its_own(tmp_path, monkeypatch):
    cache = tmp_path / "plan.json"
    for build in range(20):
        monkeypatch.setattr(library, "digest", lambda build=build: f"{build:08x}")
        assert plan_files.read_times(cache) == {}
        assert plan_files.write_times(cache, {"a": {"dense": [1.0], "native": {}}})
        assert plan_files.read_times(cache)
    machines = list(json.loads(cache.read_text())["machines"])
    assert len(machines) == 16
    assert machines[-1].endswith(" 00000013")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 1, "machines": {}}',
        '{"format": 2, "machines": 3}',
        '{"format": 2, "machines": {"m": {"a": {"dense": [-1], "native": {}}}}}',
        '{"format": 2, "machines": {"m": {"a": {"dense": 1, "native": {}}}}}',
    ],
)
def test_a_damaged_cache_is_left_aside_with_a_warning_and_replaced(tmp_path, content):
    cache = tmp_path / "plan.json"
    cache.write_text(content)
    machine = Machine(1e-3, lambda density: 5e-4, cache)
    with pytest.warns(RuntimeWarning, match=r"plan\.json holds no measured times") as warned:
        assert machine.settle(mask_of(0.6)) == NATIVE
    assert len(warned) == 1
    with pytest.warns(RuntimeWarning):
        machine.plan.save_times()
    assert plan_files.read_times(cache)


def test_a_place_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("")
    machine = Machine(1e-3, lambda density: 5e-4, tmp_path / "file" / "plan.json")
    assert machine.settle(mask_of(0.6)) == NATIVE
    machine.plan.save_times()
    assert os.listdir(tmp_path) == ["file"]


def test_times_are_written_now_and_then(tmp_path):
    machine = Machine(1e-3, lambda density: 5e-4, tmp_path / "plan.json", step=1.0)
    machine.settle(mask_of(0.6))
    assert (tmp_path / "plan.json").exists()


def test_the_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GRANET_PLAN_CACHE", str(tmp_path / "mine.json"))
    assert plan_files.cache_path() == tmp_path / "mine.json"
    monkeypatch.setenv("GRANET_PLAN_CACHE", "")
    assert plan_files.cache_path() is None
    monkeypatch.delenv("GRANET_PLAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_files.cache_path() == tmp_path / "granet" / "plan.json"


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("GRANET_PLAN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(plan_files.Path, "home", home)
    assert plan_files.cache_path() is None


def test_the_report_names_what_ran_and_how_much_faster_it_is():
    machine, mask = Machine(1e-3, lambda density: 2.5e-4), mask_of(0.6)
    assert machine.plan.report(mask) == {}
    assert machine.plan.speedup(mask) is None
    machine.call(mask)
    assert machine.plan.report(mask) == {"forward": (DENSE, None)}
    machine.settle(mask)
    assert machine.plan.report(mask) == {"forward": (NATIVE, pytest.approx(4))}
    assert machine.plan.speedup(mask) == pytest.approx(4)
    mask[0, 0] = ~mask[0, 0]
    assert machine.plan.report(mask) == {"forward": (NATIVE, pytest.approx(4))}


def test_many_threads_lose_nothing():
    machine = Machine(1e-3, lambda density: 5e-4)
    masks = [mask_of(density) for density in (0.5, 0.1, 0.7)]

    def work():
        for _ in range(200):
            for mask in masks:
                machine.call(mask)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(machine.call(mask) == NATIVE for mask in masks)


needs_library = pytest.mark.skipif(library.unavailable() is not None, reason="no native library")


@needs_library
@pytest.mark.parametrize(("shape", "most"), [((20, 50), 0.3), ((20, 50, 1, 1), 0.5)])
def test_the_rule_leaves_linear_layers_dense_for_longer_than_convolutions(shape, most):
    x, weight = torch.randn(8, 50, *shape[2:]), torch.randn(shape)
    op = granet_kernels.linear if len(shape) == 2 else granet_kernels.conv2d
    for density, expected in ((most, NATIVE), (most + 0.05, DENSE)):
        mask = mask_of(density).view(shape)
        with plan.use("rule"):
            op(x, weight, mask)
        assert plan.report(mask)["forward"][0] == expected


@needs_library
def test_the_ops_follow_the_plan_and_agree(random_mask):
    mask, weight = random_mask((30, 40), 0.5), torch.randn(30, 40, requires_grad=True)
    x = torch.randn(8, 40, requires_grad=True)
    results = []
    for mode in (NATIVE, DENSE):
        with plan.use(mode):
            y = granet_kernels.linear(x, weight, mask)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight))))
        assert {way: name for way, (name, _) in plan.report(mask).items()} == dict.fromkeys(plan.DIRECTIONS, mode)
    for native, dense in zip(*results, strict=True):
        torch.testing.assert_close(native, dense, rtol=0, atol=1e-6 * float(dense.detach().abs().max()))


@needs_library
def test_the_ops_are_measured(random_mask):
    # Too large to go past the op where the plan finds dense code faster.
    mask, weight, x = random_mask((600, 500), 0.1), torch.randn(600, 500), torch.randn(8, 500)
    plan.clear()
    with plan.use("measured"):
        for _ in range(100):
            granet_kernels.linear(x, weight, mask)
        (name, speedup) = plan.report(mask)["forward"]
    assert name in (NATIVE, DENSE)
    assert speedup is not None
    assert plan.summary().calls == 100


@needs_library
def test_a_forked_child_and_the_environment(tmp_path):
    """GRANET_PLAN is obeyed, a fork while the lock is held does not hang the child, and times are written at exit."""
    script = """
import os, threading, torch, granet_kernels
from granet_kernels import plan
assert plan.mode() == "measured"
torch.set_num_threads(1)
mask, weight, x = torch.rand(300, 400) < 0.1, torch.randn(300, 400), torch.randn(4, 400)
run = lambda: [granet_kernels.linear(x, weight, mask) for _ in range(40)]
run()
with plan._plan._lock:
    child = os.fork()
    if child == 0:
        run()
        os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    cache = tmp_path / "plan.json"
    environment = {**os.environ, "GRANET_PLAN": "measured", "GRANET_PLAN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)
    assert len(plan_files.read_times(cache)) == 1
    environment["GRANET_PLAN"] = "spares"
    failed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (
        "GRANET_PLAN: expected measured, rule, native, dense or a file that plan.save wrote, got 'spares'"
        in failed.stderr
    )
