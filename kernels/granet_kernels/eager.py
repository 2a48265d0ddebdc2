"""Whether torch runs plain tensors now, and nothing watches the ops: then work may go ways that a graph could not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(*operands: object) -> bool:
    """Whether none of these is at work: compile, export, jit.trace, torch.func, forward-mode derivatives, a mode that
    sees every op, or a subclass of Tensor among the operands."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _python_dispatch._get_current_dispatch_mode() is not None
    ):
        return False
    for operand in operands:  # noqa: SIM110  A generator takes twice the time.
        if type(operand) not in _PLAIN and isinstance(operand, Tensor):
            return False
    return True
