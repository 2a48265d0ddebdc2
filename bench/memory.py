"""Peak memory of a call over what is held before it: all of the process, native code's own buffers included.

torch's profiler counts torch's tensors only; the scratch memory of oneDNN, MKL and the native kernels is not among
them. So this reads the peak of the resident set, which Linux lets a process reset, after malloc has returned the free
memory that it holds back: the figure is exact to some pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from granet_kernels.cpu_backend import memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], object]) -> int | None:
    """The most bytes that a call of `run` holds beyond the state before it; None where this cannot be measured.

    What the first call leaves behind for good (optimizer state, an index) belongs to the state before: call it once
    first. Measured by resident pages, so on a machine that swaps it is too low.
    """
    if not _STATUS.exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None
    memory.release()  # what granet's pool keeps is to be counted with the call that uses it
    ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    run()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"no {field} in {_STATUS}")
