"""Whether torch runs plain tensors now, and nothing watches the ops: then work may go ways that a graph could not."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

# By their own names: looked up one in another, they take several times as long where the caches hold something else.
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad

_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # from torch 2.8 on
_PLAIN = frozenset({torch.Size, tuple, list, int, float, bool, type(None)})


def is_eager(*operands: Any) -> bool:
    """Whether none of these is at work: compile, export, jit.trace, torch.func, forward-mode derivatives, a mode that
    sees every op, or an operand that is no plain tensor or number (a subclass of Tensor, a proxy, a symbol, the
    gradients that torch.autograd.grad(is_grads_batched=True) hands to backward passes)."""
    return not torch.compiler.is_compiling() and is_eager_code(*operands)


def is_eager_code(*operands: Any) -> bool:
    """`is_eager` for callers that know that nothing is being compiled."""
    if (
        _get_tracing_state() is not None
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
    ):
        return False
    for operand in operands:
        if type(operand) in _TENSORS:
            # Memory holds the negated values, or there is none: the dispatcher's work. (What a transform has wrapped is
            # so still when it is over.)
            if operand.is_neg() or is_legacy_batchedtensor(operand) or is_functorch_wrapped_tensor(operand):
                return False
        elif type(operand) not in _PLAIN:
            return False
    return True


def packs_saved_tensors() -> bool:
    """Whether somebody takes what autograd saves: torch.utils.checkpoint, say, which expects as many of the same shapes
    of a forward pass and of its repetition."""
    if _top_hooks is not None:
        return _top_hooks(True) is not None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != torch.utils.checkpoint.__file__:
        frame = frame.f_back
    return frame is not None
