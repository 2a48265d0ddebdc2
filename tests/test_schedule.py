"""Schedules as functions of the step."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from granet.schedule import (
    cosine,
    cosine_decay,
    cubic_sparsity,
    linear_decay,
    resolve_time,
    step_decay,
    warmup,
)

fractions = st.floats(0, 1)


# Sparsity


def test_cubic_on_paper() -> None:
    # A quarter, half and three quarters of the way: 1 - (3/4)^3, 1 - (1/2)^3 and 1 - (1/4)^3 of the difference .4.
    values = [cubic_sparsity(step, 100, 500, 0.5, 0.9) for step in (0, 100, 200, 300, 400, 500, 501)]
    assert values[:2] == [0.5, 0.5]
    assert values[2:5] == pytest.approx([0.9 - 0.4 * 27 / 64, 0.9 - 0.4 / 8, 0.9 - 0.4 / 64])
    assert values[5:] == [0.9, 0.9]


@given(st.integers(0, 1000), st.integers(1, 10**6), fractions, fractions)
def test_cubic_goes_from_exactly_initial_to_exactly_final(
    begin: int, length: int, initial: float, final: float
) -> None:
    end = begin + length
    assert cubic_sparsity(begin, begin, end, initial, final) == initial
    assert cubic_sparsity(end, begin, end, initial, final) == final
    low, high = sorted((initial, final))
    steps = [begin + length * k // 7 for k in range(8)]
    values = [cubic_sparsity(step, begin, end, initial, final) for step in steps]
    assert all(low <= value <= high for value in values)
    assert values == sorted(values, reverse=initial > final)


def test_cubic_never_falls_below_initial_by_rounding() -> None:
    # .9 + (.1 - .9) is .09999999999999998 in floating point.
    assert cubic_sparsity(1, 0, 10**18, 0.1, 0.9) == 0.1


def test_cubic_of_one_step_is_final() -> None:
    assert [cubic_sparsity(step, 5, 5, 0.0, 0.9) for step in (4, 5, 6)] == [0.0, 0.9, 0.9]


def test_cubic_backwards() -> None:
    with pytest.raises(ValueError, match="begin <= end, got 6 and 5"):
        cubic_sparsity(0, 6, 5, 0.0, 0.9)


# Neuroregeneration ratio


def test_ratio_of_granet() -> None:
    assert cosine(0, 80_000, 0.5, 0.005) == 0.5
    assert cosine(40_000, 80_000, 0.5, 0.005) == pytest.approx(0.2525, abs=1e-15)
    assert cosine(80_000, 80_000, 0.5, 0.005) == 0.005
    assert cosine(80_001, 80_000, 0.5, 0.005) == 0.005
    # A third of the way: (1 + cos 60 degrees) / 2 = 3/4.
    assert cosine(1, 3, 0.3, 0.0) == pytest.approx(0.225)


@pytest.mark.parametrize(("step", "total"), [(-1, 10), (0, 0), (1, -5)])
def test_cosine_out_of_range(step: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"step >= 0 and total > 0, got {step} and {total}"):
        cosine(step, total, 0.5, 0.005)
    with pytest.raises(ValueError, match=f"step >= 0 and total > 0, got {step} and {total}"):
        linear_decay(step, total)


# Times


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0, 0),
        (1000, 1000),
        (62_560, 62_560),
        (0.0, 0),
        (0.5, 31_280),
        (1.0, 62_560),
        ("110 epochs", 43_010),
        ("68.75%", 43_010),
        ("1 epoch", 391),
        ("2.5 epochs", 978),
        ("1000 steps", 1000),
        (" 1 Step ", 1),
        ("80epochs", 31_280),
        ("100 %", 62_560),
    ],
    ids=repr,
)
def test_resolve_time(value: int | float | str, steps: int) -> None:
    result = resolve_time(value, total_steps=160 * 391, steps_per_epoch=391)
    assert result == steps
    assert isinstance(result, int)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, r"within the run of 1000 steps, got -1 \(-1 steps\)"),
        (1001, r"within the run of 1000 steps, got 1001"),
        ("11 epochs", r"within the run of 1000 steps, got '11 epochs' \(1100 steps\)"),
        ("-1 epochs", r"within the run of 1000 steps, got '-1 epochs' \(-100 steps\)"),
        ("101%", r"within the run of 1000 steps, got '101%'"),
        (1.5, r"a float in \[0, 1\] \(fraction of the run\).*, got 1\.5"),
        (-0.5, r"a float in \[0, 1\].*, got -0\.5"),
        (math.nan, r"a float in \[0, 1\].*, got nan"),
        (True, r"an int \(steps\).*, got True"),
        (None, r"an int \(steps\).*, got None"),
        ("1000", r"a text like '110 epochs'.*, got '1000'"),
        ("2.5 steps", r"a text like '110 epochs'.*, got '2\.5 steps'"),
        ("ten epochs", r"a text like '110 epochs'.*, got 'ten epochs'"),
        ("", r"a text like '110 epochs'.*, got ''"),
    ],
    ids=repr,
)
def test_time_that_is_none(value: int | float | str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^prune_until: expected .*{message}"):
        resolve_time(value, 1000, 100, name="prune_until")


def test_epochs_need_their_length() -> None:
    with pytest.raises(ValueError, match=r"^time: expected steps_per_epoch to be known .* got '2 epochs'"):
        resolve_time("2 epochs", 1000)


# Learning rate


def test_step_decay() -> None:
    factors = [step_decay(step, [80, 120], 0.1) for step in (0, 79, 80, 119, 120, 1000)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert step_decay(5, [], 0.1) == 1.0
    with pytest.raises(ValueError, match=r"ascending order, got \[120, 80\]"):
        step_decay(0, [120, 80], 0.1)


def test_cosine_decay() -> None:
    assert [cosine_decay(step, 4) for step in range(6)] == pytest.approx(
        [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0, 0]
    )
    assert cosine_decay(4, 4, final_factor=0.1) == 0.1


def test_linear_decay() -> None:
    assert [linear_decay(step, 4) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert [linear_decay(step, 4, final_factor=0.5) for step in (0, 2, 4)] == [1, 0.75, 0.5]


def test_warmup() -> None:
    assert [warmup(step, 4) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert warmup(0, 0) == 1.0
    for step, steps in ((-1, 4), (0, -1)):
        with pytest.raises(ValueError, match=f"got {step} and {steps}"):
            warmup(step, steps)
