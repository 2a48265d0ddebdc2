"""What an optimizer does to a weight that is 0 and gets no gradient, and what state it gives to a fresh one.

Both are found by asking: a twin of the optimizer makes a few steps on a tiny parameter, some of whose elements are 0
and have gradient 0. So any optimizer works, also one this library has never heard of.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

PROBE_SIZE = 4


def group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any] | None:
    """The param group that holds `parameter`, or None."""
    for group in optimizer.param_groups:
        if any(parameter is other for other in group["params"]):
            return group
    return None


@dataclass(frozen=True)
class Probe:
    """The outcome of a few steps of an optimizer's twin on a parameter with untouched zeros.

    Attributes:
        keeps_zero: whether the zeros stayed exactly 0. False also where no twin could be built: then nothing is known.
        fresh: state tensors of the parameter's shape by name, with their value at an untouched zero.
        shared: state that is not one value an element, such as Adafactor's row means.
    """

    keeps_zero: bool
    fresh: dict[str, float]
    shared: frozenset[str]


def probe(optimizer: Optimizer, parameter: nn.Parameter, lr: float | None = None) -> Probe:
    """Step a twin of `optimizer`, with the settings of the group of `parameter`, on a tiny parameter like it.

    Args:
        lr: learning rate of the twin; None is the group's present one.
    """
    group = group_of(optimizer, parameter)
    assert group is not None
    values = torch.arange(1.0, PROBE_SIZE**2 + 1, device="cpu").reshape(PROBE_SIZE, PROBE_SIZE).sin()
    untouched = torch.eye(PROBE_SIZE, dtype=torch.bool, device="cpu")
    shape = (PROBE_SIZE, PROBE_SIZE) + (1,) * (parameter.dim() - 2)
    small = nn.Parameter(values.masked_fill(untouched, 0).reshape(shape).to(parameter))
    try:
        twin = _twin(optimizer, group, small, lr)
        for scale in (1.0, -0.5, 0.25):
            small.grad = (values.cos() * scale).masked_fill(untouched, 0).reshape(shape).to(parameter)
            twin.step(lambda: small.new_zeros(()))  # type: ignore[arg-type,return-value]
    except Exception:  # an optimizer with a constructor or needs of its own: assume nothing about it
        return Probe(keeps_zero=False, fresh={}, shared=frozenset())
    where = untouched.reshape(shape).to(parameter.device)
    tensors = {key: value for key, value in twin.state[small].items() if isinstance(value, Tensor)}
    fresh = {key: float(value[where][0]) for key, value in tensors.items() if value.shape == small.shape}
    keeps_zero = not bool(small.detach()[where].any())
    return Probe(keeps_zero, fresh, shared=frozenset(tensors.keys() - fresh.keys()))


def _twin(optimizer: Optimizer, group: dict[str, Any], parameter: nn.Parameter, lr: float | None) -> Optimizer:
    accepted = inspect.signature(type(optimizer).__init__).parameters
    settings = {key: value for key, value in group.items() if key in accepted and key != "params"}
    settings = {key: value.clone() if isinstance(value, Tensor) else value for key, value in settings.items()}
    if lr is not None:
        settings["lr"] = torch.full_like(settings["lr"], lr) if isinstance(settings["lr"], Tensor) else lr
    return type(optimizer)([parameter], **settings)


def element_state(optimizer: Optimizer, parameter: nn.Parameter, shared: frozenset[str]) -> dict[str, Tensor]:
    """The state tensors that hold one value for each element of `parameter`.

    Raises:
        ValueError: one of them is not of a floating dtype (8-bit optimizers), so that no value in it can be set.
    """
    state = optimizer.state.get(parameter, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and key not in shared}
    tensors = {key: value for key, value in tensors.items() if value.shape == parameter.shape}
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise ValueError(
                f"{type(optimizer).__name__} keeps '{key}' of a sparse weight as {value.dtype}: expected a floating "
                "dtype, in which the state of single weights can be reset"
            )
    return tensors


class StateReset:
    """Gives single elements of a parameter the optimizer state of a fresh weight.

    Made anew for each update, since what is fresh may follow the learning rate (Rprop).
    """

    def __init__(self) -> None:
        self._probes: dict[tuple[object, ...], Probe] = {}

    def __call__(self, optimizer: Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
        """Reset the elements `where`, a bool tensor of the parameter's shape."""
        fresh = self.fresh(optimizer, parameter)
        if fresh is None:
            if bool(where.any()):
                # Its history is one flat vector over all parameters, measured in a space that has just changed.
                optimizer.state.clear()
            return
        for value, fill in fresh:
            value.masked_fill_(where, fill)

    def fresh(self, optimizer: Optimizer, parameter: nn.Parameter) -> list[tuple[Tensor, float]] | None:
        """The state tensors with one value for each element, and that value for a fresh weight.

        None for LBFGS, whose state cannot be reset in single elements.
        """
        if isinstance(optimizer, LBFGS):
            return None
        if not optimizer.state.get(parameter):
            return []
        found = self._probe(optimizer, parameter)
        state = element_state(optimizer, parameter, found.shared)
        return [(value, found.fresh.get(key, 0.0)) for key, value in state.items()]

    def _probe(self, optimizer: Optimizer, parameter: nn.Parameter) -> Probe:
        key = (id(optimizer), id(group_of(optimizer, parameter)), parameter.dim(), parameter.dtype, parameter.device)
        if key not in self._probes:
            self._probes[key] = probe(optimizer, parameter)
        return self._probes[key]
