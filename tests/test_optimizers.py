"""Every optimizer of torch that takes dense tensors keeps weights and state fresh off the mask, through 50 steps."""

import pytest
import torch
from torch import nn

import granet
from granet.methods import GraNet, RigL
from granet.optimizer_state import probe


def _optimizers():
    optimizers = {
        name: cls
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
    }
    settings = {name: [{}] for name in optimizers}
    settings["SGD"] = [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}]
    settings["Adam"] = [{}, {"amsgrad": True, "weight_decay": 1e-2}, {"lr": torch.tensor(1e-3), "foreach": False}]
    settings["AdamW"] = [{}, {"maximize": True}]
    settings["Adagrad"] = [{"initial_accumulator_value": 0.25}]
    settings["ASGD"] = [{"t0": 10, "lambd": 1e-2, "weight_decay": 1e-2}]
    settings["RMSprop"] = [{"centered": True, "momentum": 0.9}]
    settings["Rprop"] = [{"lr": 0.02}]
    settings["LBFGS"] = [{"lr": 0.1}, {"line_search_fn": "strong_wolfe", "max_iter": 5}]
    variants = {}
    for name, cls in sorted(optimizers.items()):
        for each in settings[name]:
            for loop in [{}, {"foreach": True}, {"fused": True}] if each == {} or name == "SGD" else [{}]:
                if not loop or accepts(cls, loop):
                    variants["-".join([name, *each, *loop])] = (cls, {**each, **loop})
    return variants


def accepts(cls, settings):
    """Whether this torch has the optimizer's foreach or fused variant on the CPU."""
    try:
        cls([nn.Parameter(torch.zeros(2, 2))], **settings)
    except (TypeError, RuntimeError):
        return False
    return True


OPTIMIZERS = _optimizers()


def make(model, variant):
    cls, settings = OPTIMIZERS[variant]
    return cls(model.parameters(), **settings)


def off_mask_state(optimizer, weight, mask):
    """State tensors of the weight's shape, at the positions off the mask."""
    state = optimizer.state.get(weight, {})
    return {
        key: value[~mask]
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.shape == weight.shape
    }


# What a weight that never had a gradient has; 0 where nothing is said.
FRESH = {"Rprop": {"step_size": 0.02}, "Adagrad": {"sum": 0.25}, "Adamax": {"exp_inf": 1e-8}}


@pytest.mark.parametrize("variant", OPTIMIZERS)
def test_off_mask_weight_and_state_are_fresh_after_every_step(variant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 3, bias=False))
    granet.sparsify(model)
    optimizer = make(model, variant)
    method = GraNet(sparsity=0.8, update_every=4, prune_until=30, total_steps=52)
    sparsifier = granet.Sparsifier(model, optimizer, method)
    fresh = FRESH.get(type(optimizer).__name__, {})
    x, y = torch.randn(64, 12), torch.randint(0, 3, (64,))
    restarted = 0

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for step in range(1, 51):
        before = {layer.name: layer.mask.clone() for layer in sparsifier.layers}
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        for layer in sparsifier.layers:
            weight, mask = layer.weight, layer.mask
            assert not weight[~mask].any(), f"step {step}"
            for key, values in off_mask_state(optimizer, weight, mask).items():
                assert (values == torch.tensor(fresh.get(key, 0.0))).all(), f"step {step}: {key}"
            grown = mask & ~before[layer.name]
            restarted += int(grown.sum())
            assert not weight[grown].any(), f"step {step}"
            for key, values in off_mask_state(optimizer, weight, ~grown).items():
                assert (values == torch.tensor(fresh.get(key, 0.0))).all(), f"step {step}: {key} of grown units"
            if isinstance(optimizer, torch.optim.LBFGS) and method.is_update(step):
                assert not optimizer.state
    assert restarted > 0
    assert sparsifier.nnz == round(0.2 * sparsifier.numel)
    assert all(layer.weight.isfinite().all() for layer in sparsifier.layers)


@pytest.mark.parametrize("variant", [v for v in OPTIMIZERS if not v.startswith("LBFGS")])
def test_the_skipped_step_of_rigl_changes_no_kept_weight(variant):
    torch.manual_seed(0)
    model = granet.sparsify(nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 3, bias=False)))
    optimizer = make(model, variant)
    sparsifier = granet.Sparsifier(model, optimizer, RigL(sparsity=0.5, update_every=3, total_steps=20))
    for step in range(1, 7):
        optimizer.zero_grad()
        model(torch.randn(8, 12)).square().sum().backward()
        before = [layer.weight.detach().clone() for layer in sparsifier.layers]
        optimizer.step()
        moved = any(
            bool((layer.weight != old)[layer.mask & (old != 0)].any())
            for layer, old in zip(sparsifier.layers, before, strict=True)
        )
        assert moved == (step % 3 != 0)
        assert all(layer.weight.grad is not None for layer in sparsifier.layers)


def test_an_optimizer_with_a_dense_update_is_found_by_asking():
    weight = nn.Parameter(torch.randn(4, 6))
    assert probe(torch.optim.SGD([weight], lr=0.1, momentum=0.9), weight).keeps_zero
    assert not probe(Drifting([weight]), weight).keeps_zero


class Drifting(torch.optim.Optimizer):
    """Moves every weight, whatever its gradient, and cannot be built from its group's settings alone."""

    def __init__(self, params, drift=0.01, *, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.drift = drift

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("seen", torch.zeros_like(parameter)).add_(1)
                parameter.add_(self.drift)


def test_a_dense_update_is_masked_after_every_step():
    model = granet.sparsify(nn.Linear(6, 4))
    optimizer = Drifting(model.parameters())
    sparsifier = granet.Sparsifier(
        model, optimizer, GraNet(sparsity=0.5, initial_sparsity=0.5, update_every=2, total_steps=9)
    )
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).sum().backward()
        optimizer.step()
        assert not model.weight[~sparsifier.layers[0].mask].any()


def test_lbfgs_takes_the_dense_gradient_of_the_first_evaluation_only():
    torch.manual_seed(0)
    model = granet.sparsify(nn.Linear(10, 10))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    sparsifier = granet.Sparsifier(model, optimizer, RigL(sparsity=0.5, update_every=1, total_steps=5, skip_step=False))
    dense = []

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.ones(2, 10)) - 1).square().sum()
        loss.backward()
        dense.append(bool(model.weight.grad[~model.mask].any()))
        return loss

    optimizer.step(closure)
    assert len(dense) > 1
    assert dense == [True] + [False] * (len(dense) - 1)
    assert sparsifier.step == 1
