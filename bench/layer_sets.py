"""Named sets of layers: every distinct convolution of a network at its resolution, and three Linear layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from granet.models import create_model


@dataclass(frozen=True)
class LayerShape:
    """One layer and its input; a Linear layer is one with size 1x1 and no window.

    Attributes:
        kind: "conv2d" or "linear".
        size: height and width of the input.
        count: how often the network has this layer.
    """

    kind: str
    batch: int
    inputs: int
    outputs: int
    size: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    count: int = 1

    def __str__(self) -> str:
        if self.kind == "linear":
            return f"linear {self.inputs}->{self.outputs}"
        stride = "" if self.stride == (1, 1) else f" stride {self.stride[0]}"
        window = "x".join(map(str, self.kernel))
        return f"conv {window} {self.inputs}->{self.outputs}{stride} at {'x'.join(map(str, self.size))}"

    @property
    def is_product(self) -> bool:
        """Whether the layer is a plain product with its weight as a matrix."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def in_mean(self) -> bool:
        """The first layer of a network, with the colours as channels, is no candidate for sparsity."""
        return self.inputs > 3

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.outputs, self.inputs) if self.kind == "linear" else (self.outputs, self.inputs, *self.kernel)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.batch, self.inputs) if self.kind == "linear" else (self.batch, self.inputs, *self.size)

    @property
    def output_size(self) -> tuple[int, int]:
        geometry = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        height, width = ((s + 2 * p - d * (k - 1) - 1) // stride + 1 for s, k, stride, p, d in geometry)
        return height, width

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.batch, self.outputs) if self.kind == "linear" else (self.batch, self.outputs, *self.output_size)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one direction, dense."""
        return self.batch * math.prod(self.output_size) * math.prod(self.weight_shape)


LINEAR = (
    LayerShape("linear", batch=512, inputs=1024, outputs=1024),
    LayerShape("linear", batch=512, inputs=3072, outputs=768),
    LayerShape("linear", batch=2048, inputs=4096, outputs=1024),
)


def layer_set(name: str, batch: int = 128, image_size: int = 32) -> list[LayerShape]:
    """The layers of a set.

    Args:
        name: "linear" for the three Linear layers, which have batches of their own; or a model of granet, for its
            distinct convolutions in the order of their first use.
        batch: images.
        image_size: height and width of the model's input.
    Raises:
        ValueError: no such model, or it has no convolution without groups.
    """
    if name == "linear":
        return list(LINEAR)
    shapes = _convolutions(create_model(name), image_size)
    if not shapes:
        raise ValueError(f"expected a model with convolutions, or linear, got {name}")
    return [replace(shape, batch=batch, count=count) for shape, count in shapes.items()]


def _convolutions(model: nn.Module, image_size: int) -> Counter[LayerShape]:
    found: Counter[LayerShape] = Counter()

    def record(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        if module.groups > 1 or isinstance(module.padding, str):
            return
        shape = LayerShape(
            kind="conv2d",
            batch=1,
            inputs=module.in_channels,
            outputs=module.out_channels,
            size=_pair(args[0].shape[2:]),
            kernel=_pair(module.kernel_size),
            stride=_pair(module.stride),
            padding=_pair(module.padding),
            dilation=_pair(module.dilation),
        )
        found[shape] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, image_size, image_size))
    return found


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return first, second
