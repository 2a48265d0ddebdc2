"""What the op families check before they run: dtypes, devices and shapes, with the argument named.

Every check reads metadata only, so it costs no synchronisation and traces under ``torch.compile(fullgraph=True)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_operands(
    op: str, x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dense_wgrad: Tensor | None
) -> None:
    """Raise ValueError unless the operands of a sparse layer agree in dtype, device and (but for x) shape.

    The weight is the yardstick: the others are compared with it. The shape of x is the op family's to check.
    """
    if weight.dtype not in DTYPES:
        raise ValueError(f"{op}: expected weight of dtype float32, float64, bfloat16 or float16, got {weight.dtype}")
    check_like(op, "x", x, weight.dtype, weight.device)
    check_like(op, "mask", mask, torch.bool, weight.device)
    if mask.shape != weight.shape:
        raise ValueError(
            f"{op}: expected mask of the weight's shape {tuple(weight.shape)}, got shape {tuple(mask.shape)}"
        )
    if bias is not None:
        check_like(op, "bias", bias, weight.dtype, weight.device)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(f"{op}: expected bias of shape ({weight.shape[0]},), got shape {tuple(bias.shape)}")
    check_flag(op, dense_wgrad)


def check_like(op: str, name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless the named argument has the dtype and lies on the device."""
    if tensor.dtype != dtype:
        raise ValueError(f"{op}: expected {name} of dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{op}: expected {name} on device {device}, got one on {tensor.device}")


def check_flag(op: str, dense_wgrad: Tensor | None) -> None:
    """Raise ValueError unless the flag is None or a 0-dim bool tensor in CPU memory, which is read without a sync."""
    if dense_wgrad is None:
        return
    if not isinstance(dense_wgrad, Tensor):
        raise ValueError(f"{op}: expected dense_wgrad to be None or a 0-dim bool tensor, got {dense_wgrad!r}")
    if dense_wgrad.dtype != torch.bool or dense_wgrad.dim() != 0 or dense_wgrad.device.type != "cpu":
        raise ValueError(
            f"{op}: expected dense_wgrad to be None or a 0-dim bool tensor on the cpu, got "
            f"shape {tuple(dense_wgrad.shape)}, {dense_wgrad.dtype} on {dense_wgrad.device}"
        )
