"""OffMaskGuard: keeps weights off the mask at 0 against whatever moves them besides the sparse layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from granet.gradients import GradientTap
from granet.optimizer_state import StateReset, element_state, group_of, probe
from granet.topology import Layer

CHECK_EVERY = 100  # steps; a check reads the weights once, about a hundredth of what a step does


class OffMaskGuard:
    """Most optimizers leave a weight alone that is 0, has fresh state and gets no gradient. This is for the rest.

    An optimizer whose update is dense whatever the gradient (Muon) is found by asking it; its weights are masked after
    every step. A gradient that does not come from the sparse layers (a penalty on the weights in the loss, a model that
    multiplies a layer's weight itself) is found by checking now and then; weights and gradients are masked in every
    step from then on.

    Args:
        layers: the sparse weights, each with the optimizer that holds it.
        tap: which masks the gradients once they are found to be foreign.
    """

    def __init__(self, layers: Sequence[tuple[Layer, Optimizer]], tap: GradientTap) -> None:
        self._layers = layers
        self._tap = tap
        self._leaky = {id(optimizer) for optimizer in _dense_updaters(layers)}
        self._check_next = True
        self._found_before = False

    def check_next(self) -> None:
        """Check after the coming step: optimizer state was loaded that may know nothing of the masks."""
        self._check_next = True

    def after_step(self, optimizer: Optimizer) -> None:
        """Mask the weights of an optimizer that is known to move them."""
        if id(optimizer) not in self._leaky:
            return
        with torch.no_grad():
            for layer, owner in self._layers:
                if owner is optimizer:
                    layer.weight.masked_fill_(~layer.mask, 0)

    def check(self, step: int) -> None:
        """Look, now and then, whether weights off the mask have moved, and put them back.

        Once may be a dense state that was loaded; twice in a row is a gradient that keeps coming.

        Raises:
            ValueError: the optimizer keeps state in which single weights cannot be reset.
        """
        if step == 1:
            self.check_state()
        if self._check_next or step % CHECK_EVERY == 0:
            with torch.no_grad():
                self._put_back()

    def _put_back(self) -> None:
        moved = [la.name for la, _ in self._layers if bool(la.weight.masked_fill(la.mask, 0).any())]
        if moved:
            reset = StateReset()
            for layer, optimizer in self._layers:
                layer.weight.masked_fill_(~layer.mask, 0)
                reset(optimizer, layer.weight, ~layer.mask)
        if moved and self._found_before and not self._tap.masks_every_step:
            self._tap.masks_every_step = True
            self._leaky = {id(optimizer) for _, optimizer in self._layers}
            warnings.warn(
                f"layer '{moved[0]}' gets a gradient off its mask from something other than the layer (a penalty on "
                "weights in the loss? a model that multiplies the weight itself?): gradient and weight are masked in "
                "every step from now on",
                stacklevel=6,
            )
        self._check_next = self._found_before = bool(moved)

    def check_state(self) -> None:
        """Raise ValueError if an optimizer keeps state in which single weights cannot be reset."""
        for layer, optimizer in self._layers:
            element_state(optimizer, layer.weight, frozenset())


def _dense_updaters(layers: Sequence[tuple[Layer, Optimizer]]) -> list[Optimizer]:
    """The optimizers that move weights which have no gradient."""
    found: list[Optimizer] = []
    asked: set[tuple[int, int]] = set()
    for layer, optimizer in layers:
        key = (id(group_of(optimizer, layer.weight)), layer.weight.dim())
        if key not in asked:
            asked.add(key)
            if not probe(optimizer, layer.weight, lr=0.01).keeps_zero:
                found.append(optimizer)
    return found
