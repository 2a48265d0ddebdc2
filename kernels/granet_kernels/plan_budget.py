"""What measuring may cost: a share of the time since the first call."""

from __future__ import annotations

from collections.abc import Callable

_SHARE, _ALLOWANCE = 0.02, 0.2  # of the time since the first call, and seconds granted from the start
_MOST_LOSS = 10.0  # winner's times charged for one call: a stall of the machine must not end the exploration


class Budget:
    """Seconds by which candidates were slower than the winner, and whether more can be afforded.

    Args:
        clock: seconds that never fall.

    Attributes:
        spent: seconds in all.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began: float | None = None
        self.spent = self._charged = 0.0  # seconds, and as they count

    def begin(self) -> None:
        """The first call; any later one changes nothing."""
        if self._began is None:
            self._began = self._clock()

    def affords(self, loss: float, part: float = 1.0) -> bool:
        """Whether that much more may be lost, if only a part of the budget is there for it."""
        return self._charged + loss < part * (_ALLOWANCE + _SHARE * self.elapsed())

    def charge(self, loss: float, best: float) -> None:
        """Take down what a call lost to the winner, which takes `best`."""
        self.spent += loss
        self._charged += min(loss, _MOST_LOSS * best)

    def elapsed(self) -> float:
        """Seconds since the first call."""
        return 0.0 if self._began is None else self._clock() - self._began
