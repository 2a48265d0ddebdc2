"""Test and training FLOPs of a sparse model, relative to the dense one.

Only Linear and Conv layers count, 2 FLOPs a multiply-accumulate (MAC); everything else is small and the same in both.
Ratios therefore need MACs only. A training step costs the forward pass three times (forward, gradient of the input,
gradient of the weight): ``3 * f_S`` sparse, and ``2 * f_S + f_D`` where the method needs the gradient of the dense
weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_COUNTED = (nn.Linear, _ConvNd, nn.MultiheadAttention)


def layer_macs(model: nn.Module, inputs: Sequence[int] | Tensor | tuple[Tensor, ...]) -> dict[str, int]:
    """Multiply-accumulates of every Linear and Conv layer in one forward pass.

    The model runs once in evaluation mode without gradients; its modes and the random state are as before afterwards.
    Positions that a convolution's padding adds count as the others. A layer that is called several times has the sum,
    one that is never called has 0. nn.MultiheadAttention computes its projections without calling a layer: they are
    counted as ``NAME.in_proj`` (query, key and value; ``NAME.q_proj``, ``.k_proj`` and ``.v_proj`` where they have a
    weight each) and ``NAME.out_proj``. The products of attention itself have no weight and are not counted.

    Args:
        model: any module whose forward takes the inputs as positional arguments.
        inputs: the shape of one example without the batch, e.g. (3, 224, 224), run as float zeros with batch 1; or the
            example input, a tensor or a tuple of them, with batch 1 (a larger batch multiplies the MACs).
    Returns:
        Module name to MACs, in the order of ``model.named_modules()``.
    Raises:
        ValueError: inputs are of another form, or the model has lazy layers that have not seen an input yet.
    """
    macs = {
        counted: 0
        for name, module in model.named_modules()
        if isinstance(module, _COUNTED)
        for counted in _counted_names(name, module)
    }
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise ValueError(f"expected layers that have seen an input, got lazy parameters {', '.join(lazy)}")
    examples = _example_inputs(model, inputs)
    with _counting(model, macs), _undisturbed(model), torch.no_grad():
        model(*examples)
    return macs


def test_flops_ratio(macs: Mapping[str, int], densities: Mapping[str, float]) -> float:
    """FLOPs of a forward pass of the sparse model over those of the dense one: ``sum(d_l * MAC_l) / sum(MAC_l)``.

    Args:
        macs: layer name to MACs, from :func:`layer_macs`.
        densities: layer name to density in [0, 1]; layers that are missing are dense.
    Raises:
        ValueError: there are no MACs, a density has no layer in ``macs`` or is outside [0, 1].
    """
    total = sum(macs.values())
    if total <= 0:
        raise ValueError("expected a model with Linear or Conv layers that are used, got no multiply-accumulates")
    if unknown := densities.keys() - macs.keys():
        raise ValueError(f"expected densities of layers with known MACs, got {', '.join(sorted(unknown))}")
    if wrong := {name: density for name, density in densities.items() if not 0 <= density <= 1}:
        raise ValueError(f"expected densities in [0, 1], got {wrong}")
    return math.fsum(densities.get(name, 1.0) * count for name, count in macs.items()) / total


def layer_flops(macs: Mapping[str, int], densities: Mapping[str, float]) -> dict[str, float]:
    """FLOPs of a forward pass of the sparse model by layer: ``2 * d_l * MAC_l``.

    Args:
        macs, densities: as for :func:`test_flops_ratio`; errors too.
    """
    test_flops_ratio(macs, densities)  # refuses what does not belong together
    return {name: 2 * densities.get(name, 1.0) * count for name, count in macs.items()}


class TrainingFlops:
    """Mean training FLOPs per step of a sparse run over those of the dense run, added up step by step.

    Args:
        macs: layer name to MACs, from :func:`layer_macs`.
    """

    def __init__(self, macs: Mapping[str, int]) -> None:
        self._macs = dict(macs)
        self._steps = 0
        self._cost = 0.0  # in dense training steps

    def add(self, densities: Mapping[str, float], dense_gradient: bool, steps: int = 1) -> None:
        """Count steps with these densities: ``3 * f_S`` each, or ``2 * f_S + f_D`` if they need the dense gradient.

        Args:
            densities: as for :func:`test_flops_ratio`.
            dense_gradient: whether the gradient of the dense weight is computed in these steps.
            steps: how many of them.
        Raises:
            ValueError: as :func:`test_flops_ratio`; or steps is negative.
        """
        if steps < 0:
            raise ValueError(f"expected steps >= 0, got {steps}")
        forward = test_flops_ratio(self._macs, densities)
        self._cost += steps * ((2 * forward + 1) / 3 if dense_gradient else forward)
        self._steps += steps

    @property
    def steps(self) -> int:
        """Steps counted so far."""
        return self._steps

    @property
    def ratio(self) -> float:
        """Training FLOPs so far over those of as many dense steps.

        Raises:
            ValueError: no step has been counted.
        """
        if self._steps == 0:
            raise ValueError("expected one step or more before the ratio of training FLOPs, got 0")
        return self._cost / self._steps

    def state_dict(self) -> dict[str, int | float]:
        """The counters: plain numbers that survive JSON exactly."""
        return {"steps": self._steps, "cost": self._cost}

    def load_state_dict(self, state: Mapping[str, int | float]) -> None:
        """Continue from the counters of :meth:`state_dict`.

        Raises:
            ValueError: the state is not one of this class.
        """
        if state.keys() != {"steps", "cost"} or not (state["steps"] >= 0 and state["cost"] >= 0):
            raise ValueError(f"expected non-negative 'steps' and 'cost' of training FLOPs, got {dict(state)}")
        self._steps, self._cost = int(state["steps"]), float(state["cost"])


def training_flops_ratio(
    macs: Mapping[str, int],
    densities_at: Callable[[int], Mapping[str, float]],
    needs_gradient: Callable[[int], bool],
    total_steps: int,
) -> float:
    """Training FLOPs of a whole schedule over those of the dense run.

    Methods whose every step needs the dense gradient (SNFS, DPF) come out as ``(2 * mean(f_S) + 1) / 3``.

    Args:
        macs: layer name to MACs, from :func:`layer_macs`.
        densities_at: step (0 to total_steps - 1) to densities, as for :func:`test_flops_ratio`. Runs of steps with
            equal densities are evaluated once.
        needs_gradient: step to whether it needs the dense gradient.
        total_steps: steps of the run.
    Raises:
        ValueError: as :func:`test_flops_ratio`; or total_steps is not positive.
    Source: RigL, arXiv:1911.11134, appendix on FLOPs.
    """
    total = TrainingFlops(macs)
    states = ((densities_at(step), bool(needs_gradient(step))) for step in range(total_steps))
    for (densities, dense_gradient), run in groupby(states):
        total.add(densities, dense_gradient, sum(1 for _ in run))
    return total.ratio


def _example_inputs(model: nn.Module, inputs: Sequence[int] | Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if isinstance(inputs, Tensor):
        return (inputs,)
    items: list[Any] = list(inputs)
    if items and all(isinstance(item, Tensor) for item in items):
        return tuple(items)
    if not items or not all(isinstance(item, int) and item > 0 for item in items):
        raise ValueError(f"expected the shape of one example, a tensor or a tuple of tensors, got {inputs!r}")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return (torch.zeros(1, *items, dtype=like.dtype, device=like.device),)


@contextmanager
def _counting(model: nn.Module, macs: dict[str, int]) -> Iterator[None]:
    """Add the MACs of the calls of every layer to ``macs``."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(module, nn.MultiheadAttention):
                for counted, count in _attention_macs(name, module, args, kwargs).items():
                    macs[counted] += count
            else:
                macs[name] += _call_macs(module, args[0] if args else kwargs["input"], output)

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _COUNTED)]
    handles = [module.register_forward_hook(hook_of(name), with_kwargs=True) for name, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call_macs(module: nn.Module, values: Tensor, output: Tensor) -> int:
    """MACs of one call of a Linear or Conv layer."""
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    assert isinstance(module, _ConvNd)
    window = math.prod(module.kernel_size)
    if isinstance(module, _ConvTransposeNd):
        return values.numel() * window * (module.out_channels // module.groups)
    return output.numel() * window * (module.in_channels // module.groups)


def _counted_names(name: str, module: nn.Module) -> list[str]:
    """Under which names the MACs of a layer are counted; out_proj of an attention is a layer of its own."""
    if not isinstance(module, nn.MultiheadAttention):
        return [name]
    parts = ["in_proj"] if module.in_proj_weight is not None else ["q_proj", "k_proj", "v_proj"]
    return [f"{name}.{part}".removeprefix(".") for part in parts]


def _attention_macs(
    name: str, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, int]:
    """MACs of the projections of one call; the last dimension is features in every layout."""
    given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
    inputs = [given[part].numel() * module.embed_dim for part in ("query", "key", "value")]
    names = _counted_names(name, module)
    counts = dict(zip(names, inputs if len(names) == 3 else [sum(inputs)], strict=True))
    return {**counts, f"{name}.out_proj".removeprefix("."): given["query"].numel() * module.embed_dim}


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module's mode and the random state are as they were.

    The flag is set directly because models override ``train`` and ``eval``; attention's fast path would skip the hooks.
    """
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module in modes:
            module.training = False
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes.items():
            module.training = training
