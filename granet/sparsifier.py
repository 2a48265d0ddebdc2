"""Sparsifier: binds a model, its optimizer and a method, and owns the masks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from granet import report, sparsifier_state
from granet.convert import sparse_weights
from granet.gradients import GradientTap
from granet.methods import Method
from granet.optimizer_state import StateReset, group_of, probe
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
        optimizer: the optimizer, or all of them, that hold the model's sparse weights.
        method: what to prune and grow, and when, e.g. `granet.methods.GraNet(...)`.
        seed: of the random choices (start, random growth); give every rank the same.

    Attributes:
        layers: the sparse weights, in the order of the model.

    Raises:
        ValueError: no sparse layer; an optimizer that does not hold one of them; a time or count that does not fit the
            run; a layer that another Sparsifier holds. Nothing is changed then.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], method: Method, seed: int = 0
    ) -> None:
        self.model = model
        self.method = method
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.layers = [Layer(name, owner) for name, owner in sparse_weights(model).items()]
        self._check()
        method.check_times()
        self._generator = torch.Generator().manual_seed(seed)
        start = self._start()  # the last thing that can be refused

        self._step = 0
        dense_wgrad = torch.zeros((), dtype=torch.bool)
        for layer in self.layers:
            layer.owner.bind(torch.ones_like(layer.weight, dtype=torch.bool), dense_wgrad)
        self._leaky = {id(each) for each in self.optimizers if self._leaks(each)}
        self._verified = False
        self.explored = torch.zeros_like(start.kept) if method.records_exploration else None
        self._apply(start)
        owned = [(layer, self._optimizer_of(layer)) for layer in self.layers]
        self._tap = GradientTap(self.optimizers, owned, dense_wgrad)
        self._tap.ask(method.needs_gradient(1))
        self._handles = [each.register_step_pre_hook(self._before_step) for each in self.optimizers]
        self._handles += [each.register_step_post_hook(self._after_step) for each in self.optimizers]

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
    def densities(self) -> dict[str, float]:
        """Fraction of weights kept of each layer, by name."""
        return {layer.name: layer.density for layer in self.layers}

    @property
    def needs_gradient(self) -> bool:
        """Whether backward delivers the dense gradient now."""
        return self._tap.asked

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
        device = self.layers[0].weight.device
        return torch.cat([layer.granularity.contract(layer.mask).to(device) for layer in self.layers])

    def table(self) -> list[dict[str, Any]]:
        """One row a layer: name, shape, granularity, nnz, numel, sparsity, implementation."""
        return report.rows(self.layers)

    def __str__(self) -> str:
        return report.text(self)

    def state_dict(self) -> dict[str, Any]:
        """Masks (bit-packed), step, method and random state; tensors and plain values only."""
        return sparsifier_state.pack(self, self._generator)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken. Weights off the loaded masks become 0.

        Raises:
            ValueError: another method or setting, other layers, shapes or granularities, or a damaged mask. Nothing is
                changed then.
        """
        loaded = sparsifier_state.unpack(self, state)
        self._generator.set_state(loaded.generator)
        self.explored = loaded.explored
        self._apply(Topology(self.layers, loaded.kept, self._generator))
        self._step = loaded.step
        self._tap.ask(self.method.needs_gradient(self._step + 1))

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
            with torch.no_grad():
                layer.weight.masked_fill_(~layer.mask, 0)
            layer.owner.unbind()

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        raise TypeError("a Sparsifier holds hooks of one optimizer: copy the model, make a new one and load_state_dict")

    def _check(self) -> None:
        if not self.layers:
            raise ValueError(
                "no layer to sparsify: expected a model that went through granet.sparsify, got none sparse"
            )
        for layer in self.layers:
            if layer.owner.mask is not None:
                raise ValueError(f"layer '{layer.name}' is bound to a Sparsifier already: call its remove() first")
            if all(group_of(each, layer.weight) is None for each in self.optimizers):
                raise ValueError(
                    f"the optimizer does not hold the weight of layer '{layer.name}': expected one made from this "
                    "model's parameters()"
                )
        idle = [each for each in self.optimizers if all(group_of(each, la.weight) is None for la in self.layers)]
        if idle:
            raise ValueError(
                f"an optimizer ({type(idle[0]).__name__}) holds no sparse weight of the model: leave it out"
            )

    def _start(self) -> Topology:
        units = sum(layer.units for layer in self.layers)
        kept = torch.ones(units, dtype=torch.bool, device=self.layers[0].weight.device)
        topology = Topology(self.layers, kept, self._generator)
        counts = self.method.start_counts(self.layers)
        if counts != [layer.units for layer in self.layers]:
            topology.draw(counts)
        return topology

    def _optimizer_of(self, layer: Layer) -> Optimizer:
        return next(each for each in self.optimizers if group_of(each, layer.weight) is not None)

    def _leaks(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer moves weights without a gradient (Muon), so that they need masking at every step."""
        probes: dict[tuple[int, int], bool] = {}
        for layer in self.layers:
            group = group_of(optimizer, layer.weight)
            if group is not None and (id(group), layer.weight.dim()) not in probes:
                outcome = probe(optimizer, layer.weight, lr=0.01)
                probes[id(group), layer.weight.dim()] = outcome.keeps_zero
        return not all(probes.values())

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        update = self.method.is_update(self._step + 1)
        withhold = update and self.method.skips_step
        return self._tap.before_step(optimizer, args, kwargs, update=update, withhold=withhold)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._tap.after_step():
            return
        if id(optimizer) in self._leaky:
            self._mask_weights([layer for layer in self.layers if self._optimizer_of(layer) is optimizer])
        if optimizer is not self.optimizers[-1]:
            return
        self._step += 1
        update = self.method.is_update(self._step)
        if self.method.zeroing and (update or not self._verified):
            self._verify_off_mask()
        if update:
            self._update()
        self._tap.ask(self.method.needs_gradient(self._step + 1))

    def _update(self) -> None:
        topology = Topology(self.layers, self.kept(), self._generator, self._tap.growth, self._tap.has_gradient)
        self.method.update(topology, self._step)
        self._apply(topology)

    @torch.no_grad()
    def _apply(self, topology: Topology) -> None:
        """Write the masks; where units restart, zero the weight and make the optimizer state fresh."""
        reset = StateReset()
        for layer, kept, survivors in topology.parts():
            mask = layer.granularity.expand(kept, layer.shape).to(layer.weight.device)
            layer.mask.copy_(mask)
            layer.kept = int(kept.sum())
            if self.method.zeroing:
                restart = ~layer.granularity.expand(survivors, layer.shape).to(layer.weight.device)
                layer.weight.masked_fill_(restart, 0)
                reset(self._optimizer_of(layer), layer.weight, restart)
        if self.explored is not None:
            self.explored |= topology.kept.to(self.explored.device)

    @torch.no_grad()
    def _mask_weights(self, layers: Sequence[Layer]) -> None:
        if self.method.zeroing:
            for layer in layers:
                layer.weight.masked_fill_(~layer.mask, 0)

    def _verify_off_mask(self) -> None:
        """Something but the layers may move weights off the mask, e.g. a penalty on the weights in the loss."""
        self._verified = True
        for layer in self.layers:
            if bool(layer.weight.detach().masked_fill(layer.mask, 0).any()):
                warnings.warn(
                    f"layer '{layer.name}' had non-zero weights off the mask, from something other than the layer "
                    "(a penalty on weights in the loss?): they are zeroed after every step from now on",
                    stacklevel=4,
                )
                self._leaky.update(map(id, self.optimizers))
                self._mask_weights(self.layers)
                return
