"""MaxPool2d computes what nn.MaxPool2d does, natively where it halves a large image."""

import copy
import pickle

import pytest
import torch
from torch import nn

import granet
import granet_kernels
from granet import native
from granet.pooling import MaxPool2d


@pytest.fixture(autouse=True)
def _small_images_count(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(native, "LEAST_VALUES", 0)


SETTINGS = [
    {"kernel_size": 2},
    {"kernel_size": (2, 2), "stride": (2, 2)},
    {"kernel_size": 2, "stride": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "ceil_mode": True},
    {"kernel_size": 2, "dilation": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 5), (3, 8, 6)], ids=str)
def test_as_torch(settings, shape):
    x = torch.randn(shape)
    results = []
    for pool in (nn.MaxPool2d(**settings), MaxPool2d(**settings)):
        leaf = x.clone().requires_grad_()
        y = pool(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_indices_are_torchs():
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(MaxPool2d(2, return_indices=True)(x), nn.MaxPool2d(2, return_indices=True)(x))


def test_errors_are_torchs():
    with pytest.raises(RuntimeError) as torchs:
        nn.MaxPool2d(2)(torch.zeros(1, 1, 1, 1))
    with pytest.raises(RuntimeError) as ours:
        MaxPool2d(2)(torch.zeros(1, 1, 1, 1))
    assert str(ours.value) == str(torchs.value)


@pytest.mark.parametrize("native_runs", [True, False])
def test_sparsify_swaps_the_class(native_runs, monkeypatch):
    model = granet.sparsify(nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2)))
    assert type(model[1]) is MaxPool2d
    assert repr(model[1]) == repr(nn.MaxPool2d(2))
    calls = []
    monkeypatch.setattr(granet_kernels, "max_pool", lambda x: calls.append(x) or nn.functional.max_pool2d(x, 2))
    if not native_runs:
        monkeypatch.setattr(native, "LEAST_VALUES", 2**17)
    model(torch.randn(2, 1, 8, 8))
    assert len(calls) == native_runs
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied[1]) is MaxPool2d


def test_traced_as_a_leaf():
    graph = torch.fx.symbolic_trace(nn.Sequential(MaxPool2d(2))).graph
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]
