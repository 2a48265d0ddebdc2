"""Whether torch runs plain tensors now, and nothing watches the ops: then work may go ways that a graph could not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_PLAIN = frozenset({torch.Size, tuple, list, int, float, bool, type(None)})


def is_eager(*operands: Any) -> bool:
    """Whether none of these is at work: compile, export, jit.trace, torch.func, forward-mode derivatives, a mode that
    sees every op, or an operand that is no plain tensor or number (a subclass of Tensor, a proxy, a symbol)."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return False
    for operand in operands:
        if type(operand) in _TENSORS:
            if operand.is_neg():  # memory holds the negated values: the dispatcher's work
                return False
        elif type(operand) not in _PLAIN:
            return False
    return True


def is_batch_of_gradients(grad: Tensor) -> bool:
    """Whether it is what torch.autograd.grad(is_grads_batched=True) hands to backward passes: no mode tells of it."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)
