"""An update by one op is the update by Topology and Sparsifier, bit for bit; and it is left to them where it is not."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import granet
from granet import mask_update
from granet.methods import GMP, RigL
from granet.methods import GraNet as GraNetMethod

STEPS = 24


class Halved(GraNetMethod):
    """Exchanges fewer units than its parent."""

    def drop_count(self, ratio, kept):
        return super().drop_count(ratio, kept) // 2


METHODS = {
    "GraNet": lambda: GraNetMethod(
        sparsity=0.9, initial_sparsity=0.4, update_every=3, prune_until=13, total_steps=STEPS
    ),
    "GraNet, layers, zero": lambda: GraNetMethod(
        sparsity=0.8,
        initial_sparsity=0.2,
        update_every=4,
        prune_until=14,
        scope="layer",
        regrown="zero",
        total_steps=STEPS,
    ),
    "RigL": lambda: RigL(sparsity=0.7, update_every=3, total_steps=STEPS),
    "GMP": lambda: GMP(sparsity=0.8, update_every=3, prune_until=20, total_steps=STEPS),
    "GMP, layers": lambda: GMP(sparsity=0.8, update_every=3, scope="layer", max_sparsity={"0": 0.5}, total_steps=STEPS),
}
OPTIMIZERS = {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, amsgrad=True),
    "Rprop": lambda weights: torch.optim.Rprop(weights, lr=0.01),
}


def network(dtype=torch.float32, memory_format=torch.contiguous_format, granularity="unstructured"):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 20), nn.Linear(20, 5)
    )
    return granet.sparsify(model.to(dtype).to(memory_format=memory_format), granularity=granularity)


def train(model, optimizer, method, idle=None):
    """Masks, weights, optimizer state and units kept after each step. `idle` is a layer that has no gradient."""
    sparsifier = granet.Sparsifier(model, optimizer, method)
    history = []
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(STEPS):
        x = torch.randn(16, 3, 6, 6, generator=generator).to(dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(16) % 5).backward()
        if idle is not None:
            model[idle].weight.grad = None
        optimizer.step()
        state = [value for of in optimizer.state.values() for value in of.values() if isinstance(value, torch.Tensor)]
        tensors = [
            *(layer.mask for layer in sparsifier.layers),
            *(each.detach() for each in model.parameters()),
            *state,
        ]
        history.append(([each.clone() for each in tensors], [layer.kept for layer in sparsifier.layers]))
    return history


def both_ways(make):
    """The history by the op, how often it did an update, and the history without it."""
    with patch.object(
        mask_update.granet_kernels, "update_masks_", wraps=mask_update.granet_kernels.update_masks_
    ) as op:
        history = train(*make())
    model, optimizer, method, *rest = make()
    with patch.object(type(method), "as_update", lambda self, layers, step: None):
        return history, op.call_count, train(model, optimizer, method, *rest)


def assert_same(history, other):
    for step, ((tensors, kept), (others, other_kept)) in enumerate(zip(history, other, strict=True), 1):
        assert kept == other_kept, step
        for one, two in zip(tensors, others, strict=True):
            assert torch.equal(one, two), step


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_the_same_run(name, optimizer):
    def make():
        model = network()
        return model, OPTIMIZERS[optimizer](model.parameters()), METHODS[name]()

    history, updates, expected = both_ways(make)
    assert updates == sum(METHODS[name]().is_update(step) for step in range(1, STEPS + 1)) > 3
    assert_same(history, expected)


@pytest.mark.parametrize("idle", [None, 2])
def test_channels_last_and_a_layer_without_gradient(idle):
    def make():
        model = network(memory_format=torch.channels_last)
        return model, OPTIMIZERS["SGD"](model.parameters()), METHODS["GraNet"](), idle

    history, updates, expected = both_ways(make)
    assert updates > 3
    assert_same(history, expected)


def in_float64():
    model = network(torch.float64)
    return model, OPTIMIZERS["SGD"](model.parameters()), METHODS["GraNet"]()


def in_filters():
    model = network(granularity="filter")
    return model, OPTIMIZERS["SGD"](model.parameters()), METHODS["GraNet"]()


def by_lbfgs():
    model = network()
    return model, torch.optim.LBFGS(model.parameters(), max_iter=1), METHODS["GMP"]()


def by_a_subclass():
    model = network()
    method = Halved(sparsity=0.9, initial_sparsity=0.4, update_every=3, prune_until=13, total_steps=STEPS)
    return model, OPTIMIZERS["SGD"](model.parameters()), method


def keeping_values():
    model = network()
    method = GMP(sparsity=0.8, update_every=3, form="mask", total_steps=STEPS)
    return model, OPTIMIZERS["SGD"](model.parameters()), method


@pytest.mark.parametrize("make", [in_float64, in_filters, by_lbfgs, by_a_subclass, keeping_values])
def test_what_the_op_does_not_take_goes_the_other_way(make, monkeypatch):
    model, optimizer, method = make()
    if isinstance(optimizer, torch.optim.LBFGS):
        step = optimizer.step
        monkeypatch.setattr(
            optimizer, "step", lambda: step(lambda: F.cross_entropy(model(torch.ones(5, 3, 6, 6)), torch.arange(5)))
        )
    with patch.object(mask_update.granet_kernels, "update_masks_") as op:
        history = train(model, optimizer, method)
    op.assert_not_called()
    assert history[0][1] != history[-1][1] or any(
        not torch.equal(one, two)
        for one, two in zip(history[0][0], history[-1][0], strict=False)
        if one.dtype == torch.bool
    )
