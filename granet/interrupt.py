"""Ctrl-C and SIGTERM, taken as a wish to stop at the next safe point."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType


class Interrupted(Exception):  # noqa: N818
    """A run was asked to stop.

    Args:
        signum: the signal that asked.
        run_dir: the folder to resume.
        saved: whether the run was saved where it stopped; if not, it goes on from its last checkpoint.
    """

    def __init__(self, signum: int, run_dir: Path, saved: bool = True) -> None:
        state = f"saved in {run_dir}" if saved else f"what was saved before is in {run_dir}"
        super().__init__(f"stopped by {signal.Signals(signum).name}; {state}")
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
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup and shells set for background jobs
                    self._usual[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping: the run is saved after this step or evaluation; once more quits at once\n")

    def _restore(self) -> None:
        while self._usual:
            signum, handler = self._usual.popitem()
            signal.signal(signum, handler)
