"""When a module may leave torch's own operations for native ones, and how it stays a leaf of traced graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

import granet_kernels
from granet_kernels.cpu_backend import library
from granet_kernels.eager import is_eager

LEAST_VALUES = 2**17  # of an image batch: below, the call of the op costs more than its native code saves
LEAST_CHANNELS = 16  # in channels_last: fewer fill no vector, and torch is faster


def is_native_image(x: Tensor, takes_channels_last: bool = False) -> bool:
    """Whether native code takes x, and is faster: a large batch of images in float32, contiguous, on the cpu.

    Not under torch.compile, which fuses by itself, nor in a run that the plan fixes to be dense.

    Args:
        x: of any kind.
        takes_channels_last: whether the native code takes that format too.
    """
    return (
        is_eager(x)  # a traced module is to run without granet; for torch.func, custom ops have no rules
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() == 4
        and (x.is_contiguous() or (takes_channels_last and _is_channels_last(x)))
        and x.numel() >= LEAST_VALUES
        and granet_kernels.plan.mode() != "dense"
        and library.unavailable() is None
    )


def _is_channels_last(x: Tensor) -> bool:
    return x.shape[1] >= LEAST_CHANNELS and x.is_contiguous(memory_format=torch.channels_last)


def traced(module: nn.Module, input: Tensor) -> Tensor | None:
    """The node of a call of `module` while torch.fx traces, as for torch's own class; None if it does not."""
    if not isinstance(input, fx.Proxy):
        return None
    tracer: Any = input.tracer
    leaf: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(module), (input,), {})
    return leaf
