"""Schedules as plain functions of the step: sparsity, drop ratio, learning-rate factors; and times in any unit."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

_TIME_FORMS = (
    "an int (steps), a float in [0, 1] (fraction of the run), or a text like '110 epochs', '1000 steps' or '68.75%'"
)


def cubic_sparsity(step: int, begin: int, end: int, initial: float, final: float) -> float:
    """``final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3``, clamped outside [begin, end].

    Exactly ``initial`` up to ``begin`` and exactly ``final`` from ``end`` on; where the two are one step, ``final``.
    Between them it never leaves the range of the two, rounding included.

    Raises:
        ValueError: begin is after end.
    Source: To prune, or not to prune, arXiv:1710.01878, eq. 1; GraNet, arXiv:2106.10404, eq. 1.
    """
    if begin > end:
        raise ValueError(f"expected begin <= end, got {begin} and {end}")
    if step >= end:
        return float(final)
    if step <= begin:
        return float(initial)
    value = final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3
    return float(min(max(value, min(initial, final)), max(initial, final)))


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from exactly ``start`` at step 0 to exactly ``end`` at step ``total`` and after.

    GraNet's neuroregeneration ratio is ``cosine(step, total_steps, 0.5, 0.005)``.

    Raises:
        ValueError: step is negative or total not positive.
    Source: RigL, arXiv:1911.11134, section 3; GraNet, arXiv:2106.10404, section 4.
    """
    _check_step(step, total)
    if step == 0:
        return float(start)
    if step >= total:
        return float(end)
    return end + (start - end) * (1 + math.cos(math.pi * step / total)) / 2


def resolve_time(
    value: int | float | str, total_steps: int, steps_per_epoch: int | None = None, name: str = "time"
) -> int:
    """A time of a run in optimizer steps.

    Args:
        value: an int is steps; a float is a fraction of the run in [0, 1]; a text is ``"110 epochs"``, ``"1000 steps"``
            or ``"68.75%"`` (of the run). Epochs and percentages may have decimals; what is not a whole step is rounded
            to the nearest.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one epoch, needed for epochs only.
        name: what the time is, for the error.
    Returns:
        0 <= steps <= total_steps.
    Raises:
        ValueError: another form, a negative time, one beyond the run, or epochs without steps_per_epoch.
    """
    steps = _steps(value, total_steps, steps_per_epoch, name)
    if not 0 <= steps <= total_steps:
        raise ValueError(
            f"{name}: expected a time within the run of {total_steps} steps, got {value!r} ({steps} steps)"
        )
    return steps


def warmup(step: int, warmup_steps: int) -> float:
    """Learning-rate factor of a linear warm-up: ``(step + 1) / (warmup_steps + 1)``, and 1 from ``warmup_steps`` on.

    The line starts at 0 one step before the first, so that the first step (step 0, factor ``1 / (warmup_steps + 1)``)
    is not lost.

    Raises:
        ValueError: step or warmup_steps is negative.
    """
    if step < 0 or warmup_steps < 0:
        raise ValueError(f"expected step and warmup_steps >= 0, got {step} and {warmup_steps}")
    return min(1.0, (step + 1) / (warmup_steps + 1))


def step_decay(step: int, milestones: Sequence[int], gamma: float) -> float:
    """Learning-rate factor ``gamma ** (number of milestones <= step)``.

    The step of a milestone is the first with the lower rate.

    Raises:
        ValueError: milestones are not in ascending order.
    """
    if any(later < earlier for earlier, later in pairwise(milestones)):
        raise ValueError(f"expected milestones in ascending order, got {list(milestones)}")
    return float(gamma ** bisect_right(milestones, step))


def cosine_decay(step: int, total: int, final_factor: float = 0.0) -> float:
    """Learning-rate factor: half a cosine from 1 at step 0 to ``final_factor`` at step ``total`` and after.

    Raises:
        ValueError: step is negative or total not positive.
    Source: SGDR, arXiv:1608.03983, eq. 5.
    """
    return cosine(step, total, 1.0, final_factor)


def linear_decay(step: int, total: int, final_factor: float = 0.0) -> float:
    """Learning-rate factor: a line from 1 at step 0 to ``final_factor`` at step ``total`` and after.

    Raises:
        ValueError: step is negative or total not positive.
    """
    _check_step(step, total)
    if step >= total:
        return float(final_factor)
    return 1 + (final_factor - 1) * (step / total)


def _check_step(step: int, total: int) -> None:
    if step < 0 or total <= 0:
        raise ValueError(f"expected step >= 0 and total > 0, got {step} and {total}")


def _steps(value: int | float | str, total_steps: int, steps_per_epoch: int | None, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and 0 <= value <= 1:
        return round(value * total_steps)
    match = None
    if isinstance(value, str):
        match = re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*(epochs?|steps?|%)", value.strip().lower())
    if match is None or (match[2].startswith("step") and "." in match[1]):
        raise ValueError(f"{name}: expected {_TIME_FORMS}, got {value!r}")
    amount, unit = float(match[1]), match[2]
    if unit == "%":
        return round(amount * total_steps / 100)
    if unit.startswith("step"):
        return int(match[1])
    if steps_per_epoch is None:
        raise ValueError(f"{name}: expected steps_per_epoch to be known for a time in epochs, got {value!r} without it")
    return round(amount * steps_per_epoch)
