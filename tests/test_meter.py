import pytest
import torch
from torch import nn

import granet
from granet.flops import TrainingFlops, layer_macs
from granet.meter import FlopsMeter
from granet.methods import GraNet

MACS = {"0": 100, "2": 50}


def make(update_every: int = 3):
    torch.manual_seed(0)
    model = granet.sparsify(nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = GraNet(initial_sparsity=0.5, sparsity=0.8, update_every=update_every, prune_until=9, total_steps=20)
    sparsifier = granet.Sparsifier(model, optimizer, method)
    return model, optimizer, sparsifier, FlopsMeter(MACS, sparsifier, method)


def step(model, optimizer, meter):
    optimizer.zero_grad()
    model(torch.randn(4, 10)).square().sum().backward()
    meter.before_step()
    optimizer.step()


def test_every_step_counts_with_its_own_masks():
    model, optimizer, sparsifier, meter = make()
    expected = TrainingFlops(MACS)
    for number in range(1, 21):
        expected.add(sparsifier.densities, dense_gradient=number % 3 == 0)
        step(model, optimizer, meter)
        assert meter.train_ratio == pytest.approx(expected.ratio, rel=1e-12)
    kept = {layer.name: layer.nnz for layer in sparsifier.layers}
    assert meter.test_ratio == pytest.approx((kept["0"] + kept["2"]) / 150)


@pytest.mark.parametrize("at", [1, 3, 7])
def test_restored_meter_goes_on_to_the_same_bits(at):
    model, optimizer, sparsifier, meter = make()
    for _ in range(at):
        step(model, optimizer, meter)
    other = FlopsMeter(MACS, sparsifier, sparsifier.method)
    other.load_state_dict(meter.state_dict())
    assert other.train_ratio == meter.train_ratio
    for _ in range(8):
        other.before_step()
        step(model, optimizer, meter)
        assert other.train_ratio == meter.train_ratio


def test_attention_projections_are_found_under_their_names():
    model = granet.sparsify(nn.Sequential(nn.MultiheadAttention(8, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = granet.Sparsifier(
        model, optimizer, GraNet(initial_sparsity=0.5, sparsity=0.5, update_every=5, total_steps=10)
    )
    inputs = (torch.ones(1, 3, 8),) * 3
    macs = layer_macs(nn.Sequential(nn.MultiheadAttention(8, 2))[0], inputs)
    assert {f"0.{name}" for name in macs} == sparsifier.densities.keys()
