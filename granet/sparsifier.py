"""Sparsifier: binds a model, its optimizer and a method, and owns the masks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from granet import refusal, report, sparsifier_state
from granet.convert import sparse_weights
from granet.gradients import GradientTap
from granet.guard import OffMaskGuard
from granet.mask_update import update_at_once
from granet.methods import Method
from granet.nesting import StepNesting
from granet.optimizer_state import StateReset, group_of
from granet.topology import Layer, Topology


class Sparsifier:
    """Keeps a model sparse while it trains. The training loop stays as it is: this hooks `optimizer.step()`.

    Weights off the mask are exactly 0 after every step, and so is what the optimizer remembers of them (Adam's moments,
    Rprop's step size: whatever a fresh weight gets). The dense gradient is computed only for the step of an update that
    needs it; `weight.grad` is dense then from backward to the start of `optimizer.step()`, so a gradient norm taken
    in between (clipping, logging) is the dense one in that step.

    A step is one call of `optimizer.step()` that was not skipped by a GradScaler. Where the model has several
    optimizers (Muon for matrices, AdamW for the rest), the steps of the last one count: list them in the order in which
    they step.

    Args:
        model: a model that went through `granet.sparsify`.
        optimizer: the optimizer, or all of them, that hold the model's sparse weights. Of a wrapper that steps another
            optimizer (SAM, Lookahead), give the inner one.
        method: what to prune and grow, and when, e.g. `granet.methods.GraNet(...)`.
        seed: of the random choices (start, random growth); give every rank the same.
        state: what `state_dict` gave, to go on from there instead of drawing a start. The states of the model and the
            optimizer may be loaded before or after.

    Attributes:
        layers: the sparse weights, in the order of the model.

    Raises:
        ValueError: no sparse layer; an optimizer that does not hold one of them; a time or count that does not fit the
            run; a layer that another Sparsifier holds or that the method cannot mask; a state that `load_state_dict`
            would refuse. Nothing is changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        method: Method,
        seed: int = 0,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.method = method
        self.optimizers = refusal.checked_optimizers(optimizer)
        self.layers = [Layer(name, owner) for name, owner in sparse_weights(model).items()]
        refusal.check(model, self.layers, self.optimizers, method)
        method.check_times()
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0
        units = torch.ones(sum(layer.units for layer in self.layers), dtype=torch.bool, device=self._device)
        self.explored = torch.zeros_like(units) if method.records_exploration else None
        loaded = None if state is None else sparsifier_state.unpack(self, state)
        start = self._start(units) if loaded is None else Topology(self.layers, loaded.kept, self._generator)

        self._owners = {layer.name: self._optimizer_of(layer) for layer in self.layers}
        owned = [(layer, self._owners[layer.name]) for layer in self.layers]
        dense_wgrad = torch.zeros((), dtype=torch.bool, device="cpu")
        self._tap = GradientTap(owned, dense_wgrad)
        self._nesting = StepNesting()
        self._guard = OffMaskGuard(owned, self._tap) if method.zeroing else None
        if self._guard is not None:
            self._guard.check_state()  # the last thing that can be refused
        for layer in self.layers:
            layer.owner.bind(torch.ones_like(layer.weight, dtype=torch.bool), dense_wgrad)
        if loaded is None:
            self._apply(start)
            self._warn_of_empty(self.layers, "starts without a unit", stacklevel=3)
        else:
            self._take(loaded, start)
        # Whether somebody has written to the weights since.
        self._versions = [layer.weight._version for layer in self.layers]
        self._tap.ask(method.needs_gradient(self._step + 1))
        self._handles = [each.register_step_pre_hook(self._before_step) for each in self.optimizers]
        self._handles += [each.register_step_post_hook(self._after_step) for each in self.optimizers]
        self._handles += [each.register_load_state_dict_post_hook(self._after_load) for each in self.optimizers]

    @property
    def step(self) -> int:
        """Optimizer steps made; one that a GradScaler skipped does not count."""
        return self._step

    @property
    def nnz(self) -> int:
        """Number of weights kept, of all sparse layers."""
        return sum(layer.nnz for layer in self.layers)

    @property
    def numel(self) -> int:
        """Number of weights of all sparse layers."""
        return sum(layer.numel for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that is dropped."""
        return 1 - self.nnz / self.numel

    @property
    def native_share(self) -> float | None:
        """Of the products that the layers computed last (forward, both gradients), the share that sparse code did.

        None where masked dense is all there is.
        """
        names = [name for layer in self.layers for name in layer.implementations]
        return sum(name == "native" for name in names) / len(names) if names else None

    @property
    def unit_sparsity(self) -> float:
        """Fraction of the units that is dropped; what the method aims at. Filters are units of different sizes."""
        return 1 - sum(layer.kept for layer in self.layers) / sum(layer.units for layer in self.layers)

    @property
    def densities(self) -> dict[str, float]:
        """Fraction of weights kept of each layer, by name."""
        return {layer.name: layer.density for layer in self.layers}

    @property
    def needs_gradient(self) -> bool:
        """Whether backward delivers the dense gradient now."""
        return self._tap.asks

    @property
    def exploration(self) -> float:
        """ITOP's R_s: the fraction of all units that was kept at some time.

        Raises:
            ValueError: the method does not record it.
        """
        if self.explored is None:
            raise ValueError(f"exploration is recorded by ITOP only, this is {self.method.name}")
        return float(self.explored.sum()) / self.explored.numel()

    def kept(self) -> Tensor:
        """(units,) bool: the units kept, all layers in one flat buffer."""
        return torch.cat([layer.granularity.contract(layer.mask).to(self._device) for layer in self.layers])

    @property
    def _device(self) -> torch.device:
        return self.layers[0].weight.device

    def table(self) -> list[dict[str, Any]]:
        """One row a layer: name, shape, granularity, nnz, numel, sparsity, and what runs how fast."""
        return report.rows(self.layers)

    def __str__(self) -> str:
        return report.text(self)

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), step, method and random state; tensors and plain values only."""
        return sparsifier_state.pack(self, self._generator)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken. Weights off the loaded masks become 0.

        Load the states of the model and the optimizer first, but after this Sparsifier was made: making it set the
        weights off its start to 0. Where that is not the order, give the constructor the state.

        Raises:
            ValueError: another method or setting, other layers, shapes or granularities, or a damaged mask. Nothing is
                changed then.
        """
        loaded = sparsifier_state.unpack(self, state)
        untouched = self._versions == [layer.weight._version for layer in self.layers]
        if self.method.zeroing and untouched and bool((loaded.kept & ~self.kept()).any()):
            warnings.warn(
                "the state keeps weights that were set to 0 when this Sparsifier was made, and none has been written "
                "since: load the model and the optimizer after making it, or make it with Sparsifier(..., state=state)",
                stacklevel=2,
            )
        self._take(loaded, Topology(self.layers, loaded.kept, self._generator))
        self._tap.ask(self.method.needs_gradient(self._step + 1))

    def _take(self, loaded: sparsifier_state.Loaded, topology: Topology) -> None:
        self._generator.set_state(loaded.generator)
        self.explored = loaded.explored
        # The optimizer's own state_dict holds the state of the kept weights, and nothing else is in it.
        self._apply(topology, reset_state=False)
        if self._guard is not None:
            self._guard.check_next()
        self._step = loaded.step

    def dense_state_dict(self) -> dict[str, Tensor]:
        """The model's state_dict with every weight off the mask 0, for a dense model of the same architecture."""
        state = dict(self.model.state_dict())
        masks = {id(layer.weight): layer.mask for layer in self.layers}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in masks and name in state:
                state[name] = state[name].masked_fill(~masks[id(parameter)], 0)
        return state

    def remove(self) -> None:
        """Let go of the model and the optimizer; the weights off the masks stay 0 until something trains them."""
        for handle in self._handles:
            handle.remove()
        for layer in self.layers:
            if layer.owner.mask is None:
                continue  # removed before
            with torch.no_grad():
                layer.weight.masked_fill_(~layer.mask, 0)
            layer.owner.unbind()

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        raise TypeError(
            "a Sparsifier holds hooks of one optimizer: copy the model, make a new optimizer and a new Sparsifier with "
            "state=state_dict()"
        )

    def _start(self, kept: Tensor) -> Topology:
        topology = Topology(self.layers, kept, self._generator)
        counts = self.method.start_counts(self.layers)
        if counts != [layer.units for layer in self.layers]:
            topology.draw(counts)
        return topology

    def _optimizer_of(self, layer: Layer) -> Optimizer:
        return next(each for each in self.optimizers if group_of(each, layer.weight) is not None)

    # Compiled optimizer steps call these hooks as they are: what they do depends on the step.
    @torch._disable_dynamo
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._nesting.enter(optimizer):
            return None
        update = self.method.is_update(self._step + 1)
        withhold = update and self.method.skips_step
        return self._tap.before_step(optimizer, args, kwargs, update=update, withhold=withhold)

    @torch._disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._nesting.leave(optimizer) or self._tap.after_step():
            return
        if self._guard is not None:
            self._guard.after_step(optimizer)
        if optimizer is not self.optimizers[-1]:
            return
        self._step += 1
        if self._guard is not None:
            self._guard.check(self._step)
        if self.method.is_update(self._step):
            self._update()
        self._tap.ask(self.method.needs_gradient(self._step + 1))

    def _after_load(self, optimizer: Optimizer) -> None:
        if self._guard is not None:
            self._guard.check_next()

    def _update(self) -> None:
        alive = [layer for layer in self.layers if layer.kept]
        if not self._update_at_once():
            topology = Topology(self.layers, self.kept(), self._generator, self._tap.growth, self._tap.has_gradient)
            self.method.update(topology, self._step)
            self._apply(topology)
        self._warn_of_empty(alive, f"has lost all its units at step {self._step}", stacklevel=7)

    def _warn_of_empty(self, layers: Sequence[Layer], what: str, stacklevel: int) -> None:
        for layer in layers:
            if layer.kept == 0:
                warnings.warn(f"layer '{layer.name}' {what}: nothing passes it", stacklevel=stacklevel)

    def _update_at_once(self) -> bool:
        """Whether one op could do the whole update, and has."""
        update = self.method.as_update(self.layers, self._step)
        if update is None:
            return False
        layers = [(layer, self._owners[layer.name]) for layer in self.layers]
        return update_at_once(layers, update, self._tap.growth, self._tap.has_gradient)

    @torch.no_grad()
    def _apply(self, topology: Topology, *, reset_state: bool = True) -> None:
        """Write the masks; where units restart, zero the weight and make the optimizer state fresh."""
        reset = StateReset()
        for layer, kept, survivors in topology.parts():
            layer.mask.copy_(layer.granularity.expand(kept, layer.shape))
            layer.kept = int(kept.count_nonzero())  # a sum of bools is many times slower
            if self.method.zeroing:
                restart = layer.granularity.expand(survivors, layer.shape).to(layer.weight.device).logical_not_()
                layer.weight.masked_fill_(restart, 0)
                if reset_state:
                    reset(self._owners[layer.name], layer.weight, restart)
        if self.explored is not None:
            self.explored |= topology.kept.to(self.explored.device)
