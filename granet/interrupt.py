"""Ctrl-C and SIGTERM, taken as a wish to stop at the next safe point."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType


class Interrupted(Exception):  # noqa: N818
    """A run was asked to stop, and has saved itself.

    Args:
        signum: the signal that asked.
        run_dir: the folder to resume.
    """

    def __init__(self, signum: int, run_dir: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; saved in {run_dir}")
        self.signum = signum
        self.run_dir = run_dir


class StopRequest:
    """Within the `with` block, the first SIGINT or SIGTERM is noted instead of acted on; a second one acts as usual.

    Outside the main thread, where Python allows no handlers, signals keep their usual effect.

    Attributes:
        signum: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._usual: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._usual[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        while self._usual:
            signum, handler = self._usual.popitem()
            signal.signal(signum, handler)
