"""Time of what is not a product, beside torch: norm, pooling, selections, an update of all masks, the index of a mask.

`make bench`, or on a GPU machine `make bench-ops`. Every case checks its result before it is timed, and a group holds
one task: compare within it.
"""

import pytest
import torch
import torch.nn.functional as F

import granet_kernels
from granet_kernels.cpu_backend import library
from granet_kernels.layout import layout_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
IMAGES = {"64-32x32": (128, 64, 32, 32), "512-2x2": (128, 512, 2, 2)}
LAYERS = 16


def timed(benchmark, function, device):
    """Seven rounds, after one that does not count; the result of the last."""

    def run():
        result = function()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return benchmark.pedantic(run, rounds=7, warmup_rounds=1)


def with_gradients(op, *operands):
    """Zero-argument function that returns the output and the gradients of all operands; every op gets the same."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    generator = torch.Generator(leaves[0].device).manual_seed(1)
    gradient = torch.randn(op(*leaves).shape, device=leaves[0].device, generator=generator)

    def run():
        y = op(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, gradient))

    return run


def check(mine, theirs, tolerance):
    """All results together, as rounding may decide whether a ReLU passes single values."""
    for value, expected in zip(mine(), theirs(), strict=True):
        assert float((value.double() - expected).norm()) <= tolerance * float(expected.double().norm())


@pytest.mark.parametrize("implementation", ["torch", "granet"])
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("device", DEVICES)
def test_norm(benchmark, device, shape, implementation):
    benchmark.group = f"batch norm and ReLU, {shape} {device} float32, forward + backward"
    torch.manual_seed(0)
    operands = (torch.randn(shape, device=device), *torch.rand(2, shape[1], device=device).unbind())
    runs = {
        "torch": with_gradients(lambda x, g, b: F.relu(F.batch_norm(x, None, None, g, b, training=True)), *operands),
        "granet": with_gradients(lambda x, g, b: granet_kernels.norm(x, g, b, relu=True)[0], *operands),
    }
    check(runs["granet"], runs["torch"], 1e-3)
    timed(benchmark, runs[implementation], device)


@pytest.mark.parametrize("implementation", ["torch", "granet"])
@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("device", DEVICES)
def test_max_pool(benchmark, device, shape, implementation):
    benchmark.group = f"max-pooling 2x2, {shape} {device} float32, forward + backward"
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    runs = {
        "torch": with_gradients(lambda x: F.max_pool2d(x, 2), x),
        "granet": with_gradients(granet_kernels.max_pool, x),
    }
    check(runs["granet"], runs["torch"], 0)
    timed(benchmark, runs[implementation], device)


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
    timed(benchmark, mine if implementation == "granet" else theirs, device)


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
        if device == "cuda":
            torch.cuda.synchronize()

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
        if device == "cuda":
            torch.cuda.synchronize()

    updated, expected = operands(), operands()
    mine(*updated)
    by_hand(*expected)
    for got, right in zip(updated, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(got, right, strict=True))
    run = mine if implementation == "granet" else by_hand
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
    timed(benchmark, build if implementation == "granet" else mask.nonzero, "cpu")
