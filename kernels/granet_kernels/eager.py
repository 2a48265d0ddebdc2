"""Whether torch runs plain tensors now, and nothing watches the ops: then work may go ways that a graph could not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

_PLAIN = (Tensor, torch.nn.Parameter)


def is_eager(*tensors: Tensor) -> bool:
    """Whether none of these is at work: compile, export, jit.trace, torch.func, forward-mode derivatives, a mode that
    sees every op, or a subclass of Tensor."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _python_dispatch._get_current_dispatch_mode() is None
        and all(type(tensor) in _PLAIN for tensor in tensors)
    )
