"""Time of a whole training step, dense and sparse: `make bench-ops PYTEST_ARGS="-k step"`."""

import pytest
import torch
import torch.nn.functional as F

import granet
from granet.methods import Static
from granet.models import create_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
BATCH = 128


def step_of(model, optimizer, images, labels):
    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        return loss.detach()

    return step


@pytest.mark.parametrize("implementation", ["dense", "granet"])
@pytest.mark.parametrize("device", DEVICES)
def test_step(benchmark, device, implementation):
    """ResNet-20 on 3x32x32 images, SGD with momentum; sparse: 90 %, ERK."""
    benchmark.group = f"training step of resnet20, batch {BATCH}, {device}, float32"
    torch.manual_seed(0)
    sparse = granet.sparsify(create_model("resnet20", 10, 3)).to(device)
    sparse_optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01, momentum=0.9)
    sparsifier = granet.Sparsifier(sparse, sparse_optimizer, Static(sparsity=0.9, total_steps=1))
    dense = create_model("resnet20", 10, 3).to(device)  # with torch's own layers, and the same weights
    dense.load_state_dict(sparse.state_dict())
    dense_optimizer = torch.optim.SGD(dense.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(BATCH, 3, 32, 32, device=device)
    labels = torch.randint(0, 10, (BATCH,), device=device)
    steps = {
        "dense": step_of(dense, dense_optimizer, images, labels),
        "granet": step_of(sparse, sparse_optimizer, images, labels),
    }
    torch.testing.assert_close(steps["dense"](), steps["granet"]())
    assert all(not layer.weight[~layer.mask].any() for layer in sparsifier.layers)
    benchmark.pedantic(steps[implementation], rounds=9, warmup_rounds=1)
