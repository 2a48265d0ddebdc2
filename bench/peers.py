"""One layer in each implementation that is compared: what to call in each direction, and what it must return.

dense                        torch, NCHW
dense-channels_last          torch, input, weight and gradient in channels_last
dense-times-mask             torch, NCHW, the weight multiplied by the mask, and its gradient too
csr                          torch's sparse matrices in their best form, see `csr`; plain products only
granet                       granet_kernels with the measured plan, NCHW
granet-native                granet_kernels with the native kernels, NCHW
granet-native-channels_last  the same, everything in channels_last
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import granet_kernels
from bench.layer_sets import LayerShape
from bench.verify import check_close, check_zero_off
from granet_kernels import plan
from granet_kernels.layout import trust_version

DIRECTIONS = ("forward", "dgrad", "wgrad", "all")
DENSE = ("dense", "dense-channels_last")
SPARSE = ("dense-times-mask", "csr", "granet-native", "granet-native-channels_last", "granet")
IMPLEMENTATIONS = (*DENSE, *SPARSE)

_CHECKED_IMAGES = 8


@dataclass(frozen=True)
class Operands:
    """x, weight, mask (None of a dense layer) and the gradient of the output, in the layout that they are used in."""

    x: Tensor
    weight: Tensor
    grad: Tensor
    mask: Tensor | None = None

    def channels_last(self) -> Operands:
        x, weight, grad = (t.contiguous(memory_format=torch.channels_last) for t in (self.x, self.weight, self.grad))
        mask = None if self.mask is None else self.mask.contiguous(memory_format=torch.channels_last)
        return Operands(x, weight, grad, mask)


@dataclass(frozen=True)
class Candidate:
    """One direction of one implementation.

    Attributes:
        run: what is timed.
        results: turns what it returns into the results of the direction, each in the shape that torch's layer has.
    """

    run: Callable[[], Any]
    results: Callable[[Any], tuple[Tensor, ...]] = lambda returned: (
        returned if isinstance(returned, tuple) else (returned,)
    )


def draw(shape: LayerShape, seed: int = 0) -> Operands:
    """Normal operands of a dense layer, the weight scaled as at the start of a training."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape.x_shape, generator=generator)
    weight = (
        torch.randn(shape.weight_shape, generator=generator) / (shape.macs / torch.Size(shape.y_shape).numel()) ** 0.5
    )
    return Operands(x, weight, torch.randn(shape.y_shape, generator=generator))


def masked(operands: Operands, mask: Tensor) -> Operands:
    """The operands of the sparse layer: zeros off the mask, which is trusted as those of granet's layers are."""
    trust_version(mask)
    return Operands(operands.x, operands.weight.masked_fill(~mask, 0), operands.grad, mask)


def candidate(implementation: str, direction: str, shape: LayerShape, operands: Operands) -> Candidate | None:
    """An implementation of a layer in one direction; None where it has none.

    Args:
        implementation: one of IMPLEMENTATIONS.
        direction: "forward", "dgrad" (gradient of the input), "wgrad" (of the weight) or "all" (forward and both, by
            autograd).
        operands: NCHW, of the dense layer or of the sparse one.
    """
    if implementation == "csr":
        return csr(direction, shape, operands) if shape.is_product else None
    if implementation.endswith("-channels_last"):
        if shape.kind == "linear":
            return None
        operands = operands.channels_last()
    if implementation in DENSE:
        return Candidate(_dense(direction, shape, operands))
    if implementation == "dense-times-mask":
        return Candidate(_times_mask(direction, shape, operands))
    return Candidate(
        _planned("measured" if implementation == "granet" else "native", _granet(direction, shape, operands))
    )


def forward(shape: LayerShape, x: Tensor, weight: Tensor) -> Tensor:
    """torch's layer."""
    if shape.kind == "linear":
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, shape.stride, shape.padding, shape.dilation)


def backward(shape: LayerShape, grad: Tensor, x: Tensor, weight: Tensor, which: str) -> Tensor:
    """torch's "dgrad" or "wgrad" of the layer, and only that."""
    if shape.kind == "linear":
        return grad @ weight if which == "dgrad" else grad.t() @ x
    wanted = [which == "dgrad", which == "wgrad", False]
    geometry = (list(shape.stride), list(shape.padding), list(shape.dilation))
    results = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, False, [0, 0], 1, wanted)
    gradient: Tensor = results[0 if which == "dgrad" else 1]
    return gradient


def _dense(direction: str, shape: LayerShape, o: Operands) -> Callable[[], Any]:
    if direction == "all":
        return _autograd(lambda x, w: forward(shape, x, w), o)
    if direction == "forward":
        return lambda: forward(shape, o.x, o.weight)
    return lambda: backward(shape, o.grad, o.x, o.weight, direction)


def _times_mask(direction: str, shape: LayerShape, o: Operands) -> Callable[[], Any]:
    assert o.mask is not None
    mask = o.mask.float()  # as the peers keep it: a product of two float tensors is faster than with a bool one
    if direction == "all":
        return _autograd(lambda x, w: forward(shape, x, w * mask), o)
    if direction == "forward":
        return lambda: forward(shape, o.x, o.weight * mask)
    if direction == "dgrad":
        return lambda: backward(shape, o.grad, o.x, o.weight, direction)  # the product is saved by the forward pass
    return lambda: backward(shape, o.grad, o.x, o.weight, direction) * mask


def _granet(direction: str, shape: LayerShape, o: Operands) -> Callable[[], Any]:
    assert o.mask is not None
    mask = o.mask

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        if shape.kind == "linear":
            return granet_kernels.linear(x, weight, mask)
        return granet_kernels.conv2d(x, weight, mask, None, shape.stride, shape.padding, shape.dilation)

    if direction == "all":
        return _autograd(layer, o)
    if direction == "forward":
        return lambda: layer(o.x, o.weight)
    ops = torch.ops.granet
    geometry = () if shape.kind == "linear" else (shape.stride, shape.padding, shape.dilation, 1)
    if direction == "wgrad":
        wgrad = ops.linear_wgrad if shape.kind == "linear" else ops.conv2d_wgrad
        return lambda: wgrad(o.grad, o.x, mask, *geometry, None)
    if shape.kind == "linear":
        return lambda: ops.linear_dgrad(o.grad, o.weight, mask, None)
    return lambda: ops.conv2d_dgrad(o.grad, o.weight, mask, o.x.shape, *geometry, None)


def csr(direction: str, shape: LayerShape, o: Operands) -> Candidate:
    """torch's CSR in its best form: matrix @ dense, everything else prepared beforehand and not timed.

    Activations and gradients lie as (features, batch * pixels), the transposed matrix exists, and the gradient of the
    weight is taken at the kept positions by sampled_addmm.
    """
    assert o.mask is not None
    matrix = o.weight.reshape(shape.outputs, shape.inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        weight, transposed = matrix.to_sparse_csr(), matrix.t().contiguous().to_sparse_csr()
        pattern = o.mask.reshape(matrix.shape).float().to_sparse_csr()  # all kept positions, a weight of 0 too
    x, grad = (t.transpose(0, 1).reshape(t.shape[1], -1).contiguous() for t in (o.x, o.grad))
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: weight @ x,
        "dgrad": lambda: transposed @ grad,
        "wgrad": lambda: torch.sparse.sampled_addmm(pattern, grad, x.t(), beta=0.0),
    }
    undo: dict[str, Callable[[Tensor], Tensor]] = {
        "forward": lambda y: _images(y, shape.y_shape),
        "dgrad": lambda dx: _images(dx, shape.x_shape),
        "wgrad": lambda dw: dw.to_dense().reshape(shape.weight_shape),
    }
    if direction != "all":
        return Candidate(calls[direction], lambda returned: (undo[direction](returned),))
    return Candidate(
        lambda: [call() for call in calls.values()],
        lambda returned: tuple(back(value) for back, value in zip(undo.values(), returned, strict=True)),
    )


def _images(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(features, batch * pixels) -> (batch, features, ...)."""
    return values.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)


def _autograd(layer: Callable[[Tensor, Tensor], Tensor], o: Operands) -> Callable[[], tuple[Tensor, ...]]:
    x, weight = o.x.detach().requires_grad_(), o.weight.detach().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        y = layer(x, weight)
        return (y.detach(), *torch.autograd.grad(y, (x, weight), o.grad))

    return run


def _planned(mode: str, function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with plan.use(mode):
            return function()

    return run


class Reference:
    """Results of a dense layer in float64; output and input gradient of some of the images only.

    Args:
        shape, operands: of the dense layer. The gradient of its weight is that of every sparse one, too.
    """

    def __init__(self, shape: LayerShape, operands: Operands) -> None:
        self._shape = shape
        self._images = torch.linspace(0, shape.batch - 1, min(shape.batch, _CHECKED_IMAGES)).long()
        self._x = operands.x[self._images].double()
        self._grad = operands.grad[self._images].double()
        self._wgrad = backward(
            shape, operands.grad.double(), operands.x.double(), operands.weight.double(), which="wgrad"
        )

    def check(self, direction: str, results: tuple[Tensor, ...], operands: Operands) -> None:
        """Raise WrongResultError unless the results of a candidate with these operands are right.

        With a mask, the gradient of the weight must be exactly zero off it.
        """
        names = ("forward", "dgrad", "wgrad") if direction == "all" else (direction,)
        for name, got in zip(names, results, strict=True):
            if name == "wgrad":
                mask = operands.mask
                if mask is not None:
                    check_zero_off(name, got, mask)
                check_close(name, got, self._wgrad if mask is None else self._wgrad * mask)
            else:
                check_close(name, got[self._images], self._expected(name, operands.weight.double()))

    def _expected(self, name: str, weight: Tensor) -> Tensor:
        if name == "forward":
            return forward(self._shape, self._x, weight)
        return backward(self._shape, self._grad, self._x, weight, which="dgrad")
