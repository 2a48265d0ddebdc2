"""torch.compile over whole models: no graph break, the eager result, and no recompilation when masks change."""

import copy
import shutil

import pytest
import torch
from torch import nn

import granet
from granet.methods import GraNet


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding="valid", padding_mode="zeros", groups=2),
        nn.Flatten(),
        nn.Linear(8 * 9, 5),
    )
    return granet.sparsify(model)


def train(model, forward, steps):
    """Losses, final weights and masks of a run in which every step changes the masks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = GraNet(sparsity=0.8, initial_sparsity=0.3, update_every=1, prune_until=steps, total_steps=steps + 2)
    sparsifier = granet.Sparsifier(model, optimizer, method)
    generator = torch.Generator().manual_seed(1)
    losses, recompiles, masks = [], [], []
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        loss = forward(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        masks.append(sparsifier.kept())
        recompiles.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return losses, [p.detach().clone() for p in model.parameters()], masks, recompiles


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="no g++"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_eleven_mask_changes_in_one_graph_equal_eager(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make_model()
    reference = copy.deepcopy(model)
    expected = train(reference, reference, 11)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    got = train(model, compiled, 11)
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(got[2], expected[2], strict=True))
    assert not torch.equal(got[2][0], got[2][-1])
    assert got[3] == [1] * 11


def test_evaluation_with_a_bound_model_compiles_too():
    torch._dynamo.reset()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    granet.Sparsifier(model, optimizer, GraNet(sparsity=0.5, initial_sparsity=0.5, total_steps=2000))
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
