"""What of a model can be sparse: its layers, their parameters and MACs, and what ERK and uniform would keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from granet import granularity as granularities
from granet.convert import sparse_weights, sparsify
from granet.distribution import layer_counts
from granet.flops import test_flops_ratio
from granet.granularity import Granularity
from granet.models import create_model
from granet.session import image_macs
from granet.speed import LayerSpeed, measure_layers

_DIGITS, _CIFAR, _IMAGENET = (1, 8, 8), (3, 32, 32), (3, 224, 224)
_IMAGE_SHAPES = {"mlp": _DIGITS, "digits-cnn": _DIGITS, "vgg19": _CIFAR, "resnet20": _CIFAR, "resnet56": _CIFAR}
_IMAGE_SHAPES["resnet50-cifar"] = _CIFAR


@dataclass(frozen=True)
class LayerReport:
    """One weight that can be sparse.

    Attributes:
        macs: of one example.
        units: units of sparsity, or None where the granularity does not fit.
        problem: why it does not fit.
        erk, uniform: the density that each distribution gives, or None where it does not fit.
        speed: at the density of ERK; None where it was not measured, or where only the gradient is masked.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    macs: int
    units: int | None
    problem: str | None
    erk: float | None
    uniform: float | None
    speed: LayerSpeed | None


@dataclass(frozen=True)
class Diagnosis:
    """What examine found.

    Attributes:
        parameters: of the whole model.
        layers: the weights that can be sparse, in the model's order.
        macs: of all layers, for one example.
        flops_ratio: FLOPs of a forward pass with each distribution's densities, dense = 1.
        speedup: of forward and backward of all measured layers together, over the best dense ones; None if none was.
    """

    model: str
    image_shape: tuple[int, ...]
    parameters: int
    layers: list[LayerReport]
    macs: int
    flops_ratio: dict[str, float]
    speedup: float | None


def image_shape_of(model: str) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a named model is usually fed."""
    return _IMAGE_SHAPES.get(model, _IMAGENET)


def examine(
    model_name: str,
    image_shape: tuple[int, int, int] | None = None,
    num_classes: int = 10,
    sparsity: float = 0.9,
    granularity: str = "unstructured",
    measure_batch: int | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Diagnosis:
    """Look at a named model, without training it.

    Args:
        model_name: one of granet.models.model_names().
        image_shape: (channels, height, width); by default what the model is usually fed.
        num_classes: outputs of the classifier.
        sparsity: of all layers together, for the preview of the distributions.
        granularity: what one unit of sparsity is.
        measure_batch: time every layer on so many images, at the density that ERK gives it; None measures nothing.
        progress: called with the name of each layer before it is timed.
    Raises:
        ValueError: unknown model, granularity or shape; sparsity outside [0, 1); a batch below 1.
    """
    if measure_batch is not None and measure_batch < 1:
        raise ValueError(f"batch: expected 1 or more, got {measure_batch}")
    shape = image_shape or image_shape_of(model_name)
    unit = granularities.parse(granularity)
    with torch.random.fork_rng(devices=[]):
        model = create_model(model_name, num_classes, shape[0], image_size=shape[1])
    macs = image_macs(model, model_name, shape)
    sparsify(model)
    weights = {name: tuple(owner.weight.shape) for name, owner in sparse_weights(model).items()}
    problems = {name: _problem(unit, weight) for name, weight in weights.items()}
    fitting = {name: weight for name, weight in weights.items() if problems[name] is None}
    densities = {name: _densities(name, fitting, unit, sparsity) for name in ("erk", "uniform")}
    speeds: dict[str, LayerSpeed] = {}
    if measure_batch is not None:
        with torch.random.fork_rng(devices=[]):
            speeds = measure_layers(model, shape, densities["erk"], unit, measure_batch, progress)
    layers = [
        LayerReport(
            name=name,
            shape=weight,
            weights=_numel(weight),
            macs=macs.get(name, 0),
            units=unit.units(weight) if problems[name] is None else None,
            problem=problems[name],
            erk=densities["erk"].get(name),
            uniform=densities["uniform"].get(name),
            speed=speeds.get(name),
        )
        for name, weight in weights.items()
    ]
    ratios = {key: test_flops_ratio(macs, values) for key, values in densities.items()}
    found = [layer.speed for layer in layers if layer.speed is not None]
    speedup = sum(each.dense_seconds for each in found) / sum(each.seconds for each in found) if found else None
    return Diagnosis(model_name, shape, _parameters(model), layers, sum(macs.values()), ratios, speedup)


def _problem(unit: Granularity, shape: tuple[int, ...]) -> str | None:
    try:
        unit.units(shape)
    except ValueError as error:
        return str(error)
    return None


def _densities(
    distribution: str, shapes: dict[str, tuple[int, ...]], unit: Granularity, sparsity: float
) -> dict[str, float]:
    if not shapes:
        return {}
    units = [unit.units(shape) for shape in shapes.values()]
    capacities = [unit.capacity(shape) for shape in shapes.values()]
    counts = layer_counts(distribution, list(shapes.values()), units, sparsity, capacities)
    return {name: count / total for name, count, total in zip(shapes, counts, units, strict=True)}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
