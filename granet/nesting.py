"""StepNesting: tells an optimizer's own step from the steps that it makes inside.

An optimizer that subclasses another one and calls `super().step()` has torch run the hooks once for each class: before,
before, after, after. Only the outermost pair is a step.
"""

from __future__ import annotations

import sys

from torch.optim import Optimizer


class StepNesting:
    """Counts, for each optimizer, how many of its calls are running."""

    def __init__(self) -> None:
        self._running: dict[int, int] = {}

    def enter(self, optimizer: Optimizer) -> bool:
        """A pre-step hook came. Returns whether it is that of the outermost call."""
        running = self._running.get(id(optimizer), 0)
        if running and _calls_on_stack(optimizer) < 2:
            running = 0  # an earlier call left by an exception, so that no post-step hook came
        self._running[id(optimizer)] = running + 1
        return running == 0

    def leave(self, optimizer: Optimizer) -> bool:
        """A post-step hook came. Returns whether it is that of the outermost call."""
        self._running[id(optimizer)] -= 1
        return self._running[id(optimizer)] == 0


def _calls_on_stack(optimizer: Optimizer) -> int:
    """Calls of torch's wrapper around `step`, which runs the hooks, that are on the stack for this optimizer."""
    calls, frame = 0, sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.optim.optimizer" and frame.f_code.co_name == "wrapper":
            calls += frame.f_locals.get("self") is optimizer
    return calls
