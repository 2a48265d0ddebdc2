"""Time of what is not a product, beside torch: norm, pooling, selections, an update of all masks, the index of a mask.

`make bench`, or on a GPU machine `make bench-ops`. Every case checks its result before it is timed, and a group holds
one task: compare within it.
"""

import pytest
import torch
import torch.nn.functional as F

import granet_kernels
from bench.test_ops import DEVICES, forward_backward, relative_error, synchronized
from granet_kernels.cpu_backend import library
from granet_kernels.layout import layout_of

IMAGES = {"64-32x32": (128, 64, 32, 32), "512-2x2": (128, 512, 2, 2)}
LAYERS = 16


# torch's, ours, how many parameters a channel has, and the error: rounding may decide whether a ReLU passes single
# values, while a maximum is exact.
IMAGE_OPS = {
    "batch norm and ReLU": (
        lambda x, g, b: F.relu(F.batch_norm(x, None, None, g, b, training=True)),
        lambda x, g, b: granet_kernels.norm(x, g, b, relu=True)[0],
        2,
        1e-3,
    ),
    "max-pooling 2x2": (lambda x: F.max_pool2d(x, 2), granet_kernels.max_pool, 0, 0),
}


@pytest.mark.parametrize("implementation", ["torch", "granet"])
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("op", IMAGE_OPS)
@pytest.mark.parametrize("device", DEVICES)
def test_images(benchmark, device, op, shape, implementation):
    benchmark.group = f"{op}, {shape} {device} float32, forward + backward"
    torch.manual_seed(0)
    theirs, mine, parameters, tolerance = IMAGE_OPS[op]
    operands = (torch.randn(shape, device=device), *torch.rand(parameters, shape[1], device=device).unbind())
    runs = {"torch": forward_backward(theirs, *operands), "granet": forward_backward(mine, *operands)}
    for value, expected in zip(runs["granet"](), runs["torch"](), strict=True):
        assert relative_error(value, expected.double()) <= tolerance
    benchmark.pedantic(synchronized(runs[implementation], device), rounds=7, warmup_rounds=1)


def scores_of_layers(device):
    """(LAYERS, 65536) float32, no two of the same magnitude."""
    ranks = torch.randperm(LAYERS * 2**16, device=device).view(LAYERS, -1) + 1.0
    return torch.where(torch.rand_like(ranks) < 0.5, ranks, -ranks)


@pytest.mark.parametrize("implementation", ["torch.topk", "granet"])
@pytest.mark.parametrize("op", ["topk_mask", "drop", "grow"])
@pytest.mark.parametrize("device", DEVICES)
def test_selection_by_layer(benchmark, device, op, implementation):
    """A tenth kept of each of 16 layers of 64k weights; drop and grow exchange a third of that."""
    benchmark.group = f"{op} in {LAYERS} layers of 65,536 weights, by magnitude, {device}"
    torch.manual_seed(0)
    weights = scores_of_layers(device)
    scores, bounds = weights.view(-1), [2**16 * i for i in range(LAYERS + 1)]
    few, some = 2**16 // 30, 2**16 // 10
    kept = granet_kernels.topk_mask(scores, some, bounds, absolute=True)
    rows = kept.view(LAYERS, -1)

    def by_torch(sizes, count):
        chosen = torch.zeros_like(sizes, dtype=torch.bool)
        return chosen.scatter_(1, sizes.topk(count, sorted=False).indices, True)

    runs = {
        "topk_mask": (
            lambda: by_torch(weights.abs(), some),
            lambda: granet_kernels.topk_mask(scores, some, bounds, absolute=True),
        ),
        "drop": (
            lambda: by_torch(weights.abs().masked_fill_(~rows, -1), some - few),
            lambda: granet_kernels.drop(scores, kept, few, bounds, absolute=True),
        ),
        "grow": (
            lambda: by_torch(weights.abs().masked_fill_(rows, -1), few).logical_or_(rows),
            lambda: granet_kernels.grow(scores, kept, few, bounds, absolute=True),
        ),
    }
    theirs, mine = runs[op]
    assert torch.equal(mine(), theirs().view(-1))
    run = synchronized(mine if implementation == "granet" else theirs, device)
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("implementation", ["by hand", "granet"])
@pytest.mark.parametrize("device", DEVICES)
def test_update_of_all_masks(benchmark, device, implementation):
    """16 layers of 64k weights with momentum, a tenth of each kept: 30 % of that exchanged, in place."""
    benchmark.group = f"an update of {LAYERS} masks, {device}"
    torch.manual_seed(0)
    weights, growth, momenta = (list(scores_of_layers(device).unbind()) for _ in range(3))
    masks = [granet_kernels.topk_mask(weight, 2**16 // 10, absolute=True) for weight in weights]

    def operands():
        return [[part.clone() for part in parts] for parts in (masks, weights, momenta)]

    def mine(masks, weights, momenta):
        granet_kernels.update_masks_(masks, weights, growth, [[each] for each in momenta], [[0.0]] * LAYERS, ratio=0.3)

    def by_hand(masks, weights, momenta):
        for mask, weight, gradient, momentum in zip(masks, weights, growth, momenta, strict=True):
            before = mask.clone()
            moved = int(0.3 * int(mask.count_nonzero()))
            lowest = weight.abs().masked_fill_(~mask, float("inf")).topk(moved, largest=False, sorted=False).indices
            mask[lowest] = False
            mask[gradient.abs().masked_fill_(mask, -1).topk(moved, sorted=False).indices] = True
            restart = ~(before & mask)
            weight.masked_fill_(restart, 0)
            momentum.masked_fill_(restart, 0)

    updated, expected = operands(), operands()
    mine(*updated)
    by_hand(*expected)
    for got, right in zip(updated, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(got, right, strict=True))
    run = synchronized(mine if implementation == "granet" else by_hand, device)
    benchmark.pedantic(run, setup=lambda: (operands(), {}), rounds=7, warmup_rounds=1)


@pytest.mark.skipif(library.unavailable() is not None, reason="no native library")
@pytest.mark.parametrize("implementation", ["torch.nonzero", "granet"])
def test_index_of_a_mask(benchmark, implementation):
    """What the CPU kernels need of a mask of 512x512x3x3, a tenth kept, beside the kept positions alone."""
    benchmark.group = "the index of a mask of 2.4M weights, cpu"
    torch.manual_seed(0)
    mask = torch.rand(512, 512, 3, 3) < 0.1

    def build():
        mask.copy_(mask)  # a change, as far as the layout can know
        layout = layout_of(mask)
        assert layout.native
        return layout

    first = build()
    assert first.nnz == int(mask.sum())
    assert build() is not first
    benchmark.pedantic(build if implementation == "granet" else mask.nonzero, rounds=7, warmup_rounds=1)
