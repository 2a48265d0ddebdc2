"""Whether Triton kernels run on a device, and one warning where they are wanted and cannot.

They are wanted where the environment variable GRANET_TRITON is 1. It is not by default: they have been interpreted and
compiled, but no GPU has run them yet.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import torch

OLDEST_TRITON = (3, 2)
OLDEST_CHIP = (7, 0)


def is_available(device: torch.device) -> bool:
    """Whether the kernels are wanted and run on this CUDA device; warns once for each reason why they do not run."""
    if not is_wanted():
        return False
    reason = unavailable(device)
    if reason is not None:
        _warn_once(reason)
    return reason is None


def is_wanted() -> bool:
    """What GRANET_TRITON says."""
    return os.environ.get("GRANET_TRITON") == "1"


@cache
def unavailable(device: torch.device) -> str | None:
    """Why the Triton kernels do not run on a CUDA device, as a sentence without a full stop, or None if they do."""
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA devices, this is a ROCm build of torch"
    chip = torch.cuda.get_device_capability(device)
    if chip < OLDEST_CHIP:
        return f"{torch.cuda.get_device_name(device)} has compute capability {chip[0]}.{chip[1]}, Triton needs 7.0"
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        return f"Triton {triton.__version__} is too old, expected {'.'.join(map(str, OLDEST_TRITON))} or newer"
    try:
        triton.runtime.driver.active.get_current_target()  # builds what every kernel needs, as the first one would
    except Exception as error:  # no C compiler, no headers of Python: whatever stops it now would stop a run later
        return f"Triton cannot be set up ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


@cache
def _warn_once(reason: str) -> None:
    # No UserWarning: whoever turns those into errors has not asked for a run to stop where it is slow.
    warnings.warn(f"{reason}: granet runs on plain PyTorch there, at dense cost", RuntimeWarning, stacklevel=3)
