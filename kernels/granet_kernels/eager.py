"""Whether torch runs plain tensors now, and nothing watches the ops: then work may go ways that a graph could not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

_PLAIN = frozenset({Tensor, torch.nn.Parameter, torch.Size, tuple, list, int, float, bool, type(None)})


def is_eager(*operands: object) -> bool:
    """Whether none of these is at work: compile, export, jit.trace, torch.func, forward-mode derivatives, a mode that
    sees every op, or an operand that is no plain tensor or number (a subclass of Tensor, a proxy, a symbol)."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _python_dispatch._get_current_dispatch_mode() is not None
    ):
        return False
    # Memory under the negative bit holds the negated values; torch's dispatcher sees to it.
    return _PLAIN.issuperset(map(type, operands)) and not any(isinstance(o, Tensor) and o.is_neg() for o in operands)


def is_batch_of_gradients(grad: Tensor) -> bool:
    """Whether it is what torch.autograd.grad(is_grads_batched=True) hands to backward passes: no mode tells of it."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)
