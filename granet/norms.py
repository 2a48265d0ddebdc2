"""Batch norm, what may be added to its result, and ReLU in one operation, where granet_kernels is faster than torch.

In a step of a sparse model the convolutions are no longer what takes longest, so the norms between them count. On a
CPU, with the statistics of the batch, native code passes over the images fewer times than torch's operations do.
Everywhere else, and under torch.compile, which fuses by itself, torch's own operations run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import granet_kernels
from granet.native import is_native_image, traced

_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, computed natively where that is possible. Same arguments, Parameters, buffers and results."""

    def forward(self, input: Tensor) -> Tensor:
        leaf = traced(self, input)
        if leaf is not None:
            return leaf
        return self.normalize(input) if self.is_native(input) else super().forward(input)

    def is_native(self, x: Tensor, residual: Tensor | None = None) -> bool:
        """Whether `normalize` takes these; if not, forward() does what torch does, raising errors included."""
        return (
            is_native_image(x, takes_channels_last=True)
            and x.numel() > x.shape[1] > 0  # the variance of one value is torch's error to raise
            and (residual is None or _is_like(residual, x))
            and (self.training or (self.running_mean is None and self.running_var is None))
            and all(values is None or _fits(values, x) for values in (self.running_mean, self.running_var))
            and all(values is not None and _fits(values, x) for values in (self.weight, self.bias))
        )

    def normalize(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """act(batch norm of x + residual), act being max(., 0) if relu, and an update of the running statistics.

        Args:
            x: (n, c, h, w) as `is_native` demands.
            residual: as x, or None.
            relu: whether the activation follows.
        """
        y, mean, var = granet_kernels.norm(x, self.weight, self.bias, residual, self.eps, relu)
        if self.training and self.track_running_stats:
            self._track(mean, var, x.numel() // x.shape[1])
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        share = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if share is None:  # a cumulative mean
                share = 1 / float(self.num_batches_tracked)
        share = 0.0 if share is None else share
        if self.running_mean is not None:
            self.running_mean.mul_(1 - share).add_(mean, alpha=share)
        if self.running_var is not None:
            self.running_var.mul_(1 - share).add_(var, alpha=share * count / (count - 1))


class Sequential(nn.Sequential):
    """nn.Sequential that computes a BatchNorm2d and the ReLU behind it together."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            plain: Tensor = super().forward(input)
            return plain
        modules = list(self)
        while modules:
            first = modules.pop(0)
            if modules and isinstance(first, BatchNorm2d) and type(modules[0]) is nn.ReLU:
                input = norm_relu(first, input, relu=modules.pop(0))
            else:
                input = first(input)
        return input


def norm_relu(bn: nn.Module, x: Tensor, residual: Tensor | None = None, relu: nn.Module | None = None) -> Tensor:
    """relu(bn(x) + residual), in one operation if `bn` is a BatchNorm2d of this file and can compute natively.

    Where a module has hooks, or is not what it usually is, the modules are called one after the other.

    Args:
        bn: the norm, of any class.
        x: what the norm takes; natively (n, c, h, w).
        residual: of the shape of bn's result, or None.
        relu: the module of the activation; None is F.relu.
    """
    if type(bn) is BatchNorm2d and _is_bare(bn) and _is_plain_relu(relu) and bn.is_native(x, residual):
        return bn.normalize(x, residual, relu=True)
    y: Tensor = bn(x)
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu is None else relu(y)


def _is_like(residual: Tensor, x: Tensor) -> bool:
    return (
        type(residual) is Tensor
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    )


def _fits(values: Tensor, x: Tensor) -> bool:
    return values.shape == x.shape[1:2] and values.dtype == x.dtype and values.device == x.device


def _is_plain_relu(relu: nn.Module | None) -> bool:
    return relu is None or (type(relu) is nn.ReLU and _is_bare(relu))


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its forward() and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not any(_GLOBAL_HOOKS) and "forward" not in module.__dict__
