"""How fast the sparse layers of a model are on this machine, dense and native, at a given sparsity."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from granet.granularity import Granularity
from granet.modules import SparseLayer
from granet_kernels import plan

_DENSITIES = (1.0, 0.4, 0.1)  # where native code is measured besides the density asked for
_LEAST_REPEATS, _LEAST_SECONDS = 2, 0.05  # of one measurement, without the first call


@dataclass(frozen=True)
class LayerSpeed:
    """What one layer comes to.

    Attributes:
        implementation: what would run: "native", "dense", or three by direction, "native/dense/native".
        dense_seconds: torch's layer, forward, input gradient and weight gradient of one batch, in NCHW or
            channels_last, which of them is faster.
        seconds: in NCHW, the faster of sparse and masked dense code in each direction; where that is no faster than
            dense_seconds, those.
        break_even: the smallest sparsity at which native code is faster than dense; None if it never is.
    """

    implementation: str
    dense_seconds: float
    seconds: float
    break_even: float | None

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.seconds


def measure_layers(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    densities: Mapping[str, float],
    unit: Granularity,
    batch: int,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, LayerSpeed]:
    """Time the SparseLayers of a model that is not bound, each once for all that have its shapes and its density.

    Args:
        model: on the cpu; comes back as it was.
        image_shape: (channels, height, width) of what it is fed.
        densities: by layer name; other layers are left out.
        unit: masks are random in these units.
        batch: images.
        progress: called with the name of each layer before it is timed.
    Returns:
        By layer name; without those that the model does not call.
    """
    shapes = _input_shapes(model, image_shape)
    found: dict[str, LayerSpeed] = {}
    known: dict[tuple[object, ...], LayerSpeed] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer) and name in densities and name in shapes:
            shape = (batch, *shapes[name][1:])
            key = (repr(module), shape, round(densities[name], 3))
            if key not in known:
                progress(name)
                known[key] = _measure(module, torch.randn(shape), densities[name], unit)
            found[name] = known[key]
    return found


def break_even(dense: float, native: Mapping[float, float]) -> float | None:
    """The smallest sparsity at which native code is faster than dense, by lines through its times.

    Args:
        dense: seconds at any density.
        native: seconds by density, one or more, none of them 0. If native code wins at all of them it does so a while
            beyond: times grow no faster than the density.
    Returns:
        A sparsity in [0, 1), or None if native code stays slower down to density 0, or was slower at the only density.
    """
    densities = sorted(native, reverse=True)
    if native[densities[0]] < dense:
        return max(0.0, 1 - max(density * dense / native[density] for density in densities if native[density] < dense))
    if len(densities) == 1:
        return None
    for above, below in pairwise(densities):
        slope = (native[above] - native[below]) / (above - below)
        crossing = below + (dense - native[below]) / slope if slope > 0 else 0.0
        if native[below] < dense or (below == densities[-1] and crossing > 0):
            return 1 - crossing
    return None


def _measure(module: SparseLayer, x: Tensor, density: float, unit: Granularity) -> LayerSpeed:
    module = copy.deepcopy(module)
    best = _best_dense(module, x)
    dense, _ = _masked_times(module, x, density, unit, "dense")
    native = {}
    for each in {density, *_DENSITIES}:
        native[each], runs = _masked_times(module, x, each, unit, "native")
        if not runs:  # e.g. a convolution with groups
            return LayerSpeed("dense", best, best, None)
    faster = {way: "native" if native[density][way] < dense[way] else "dense" for way in plan.DIRECTIONS}
    names = list(faster.values())
    seconds = sum(min(dense[way], native[density][way]) for way in plan.DIRECTIONS)
    if seconds >= best:
        names, seconds = ["dense"], best
    return LayerSpeed(
        implementation=names[0] if len(set(names)) == 1 else "/".join(names),
        dense_seconds=best,
        seconds=seconds,
        break_even=break_even(best, {each: sum(times.values()) for each, times in native.items()}),
    )


def _best_dense(module: SparseLayer, x: Tensor) -> float:
    """Seconds of all directions together without a mask, in the memory format in which they are fewer."""
    seconds = [sum(_times(module, x).values())]
    if x.dim() == 4:
        other = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        seconds.append(sum(_times(other, x.detach().contiguous(memory_format=torch.channels_last)).values()))
    return min(seconds)


def _masked_times(
    module: SparseLayer, x: Tensor, density: float, unit: Granularity, mode: str
) -> tuple[dict[str, float], bool]:
    """`_times` with a mask, and whether the mode was obeyed. The weight becomes 0 off the mask, as in training."""
    mask = _mask(module, density, unit)
    with torch.no_grad():
        module.weight.normal_().masked_fill_(~mask, 0)
    module.bind(mask, torch.zeros((), dtype=torch.bool))
    with plan.use(mode):
        times = _times(module, x)
    module.unbind()
    ran = plan.report(mask).values()
    return times, bool(ran) and all(name == mode for name, _ in ran)


def _times(module: SparseLayer, x: Tensor) -> dict[str, float]:
    """Seconds by direction."""
    x.requires_grad_()
    y = module(x)
    grad = torch.ones_like(y)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: module(x),
        "dgrad": lambda: torch.autograd.grad(y, x, grad, retain_graph=True),
        "wgrad": lambda: torch.autograd.grad(y, module.weight, grad, retain_graph=True),
    }
    return {way: _least(call) for way, call in calls.items()}


def _least(call: Callable[[], object]) -> float:
    call()
    times: list[float] = []
    while len(times) < _LEAST_REPEATS or sum(times) < _LEAST_SECONDS:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _mask(module: SparseLayer, density: float, unit: Granularity) -> Tensor:
    shape = tuple(module.weight.shape)
    units = unit.units(shape)
    kept = torch.zeros(units, dtype=torch.bool)
    kept[torch.randperm(units)[: round(density * units)]] = True
    return torch.empty_like(module.weight, dtype=torch.bool).copy_(unit.expand(kept, shape))


def _input_shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: shapes.__setitem__(name, inputs[0].shape)

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, SparseLayer)
    ]
    training = model.training
    with torch.no_grad():
        model.eval()(torch.zeros(1, *image_shape))
    model.train(training)
    for handle in handles:
        handle.remove()
    return shapes
