"""Time of the ops beside their dense peers: `make bench`, or on a GPU machine `make bench-gpu`.

Every case checks its result against float64 before it is timed. A group holds one shape: compare within it.
"""

import pytest
import torch
import torch.nn.functional as F

import granet_kernels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
LINEAR = {"1024x1024-512": (1024, 1024, 512), "3072x768-512": (3072, 768, 512)}
CONV = {"64-32x32": (64, 32, 128), "256-8x8": (256, 8, 128), "512-4x4": (512, 4, 128)}


def relative_error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


def synchronized(function, device):
    def run(*operands):
        result = function(*operands)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def forward_backward(op, *operands):
    """Zero-argument function that returns the output and the gradients of all operands; every op gets the same."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    y = op(*leaves)
    gradient = torch.randn(y.shape, device=y.device, generator=torch.Generator(y.device).manual_seed(1))

    def run():
        y = op(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, gradient))

    run.gradient = gradient
    return run


def check(run, dense, x, weight, mask):
    """Against float64 on masked operands; the weight's gradient counts at kept positions."""
    x64, w64 = x.double().requires_grad_(), (weight.double() * mask).requires_grad_()
    y64 = dense(x64, w64)
    x_grad, w_grad = torch.autograd.grad(y64, (x64, w64), run.gradient.double())
    got = run()
    for value, expected in zip(got, (y64.detach(), x_grad, w_grad * mask), strict=True):
        assert relative_error(value if value.shape != mask.shape else value * mask, expected) < 1e-5


@pytest.mark.parametrize("implementation", ["dense", "dense-times-mask", "granet"])
@pytest.mark.parametrize("shape", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("device", DEVICES)
def test_linear(benchmark, device, shape, implementation):
    benchmark.group = f"linear {shape} {device} float32, 90 % sparse, forward + backward"
    out_features, in_features, batch = shape
    torch.manual_seed(0)
    x = torch.randn(batch, in_features, device=device)
    mask = torch.rand(out_features, in_features, device=device) < 0.1
    weight = torch.randn(out_features, in_features, device=device).masked_fill(~mask, 0)
    ops = {
        "dense": F.linear,
        "dense-times-mask": lambda x, w: F.linear(x, w * mask),
        "granet": lambda x, w: granet_kernels.linear(x, w, mask),
    }
    run = forward_backward(ops[implementation], x, weight)
    check(run, F.linear, x, weight, mask)
    benchmark(synchronized(run, device))


@pytest.mark.parametrize("implementation", ["dense", "dense-times-mask", "granet"])
@pytest.mark.parametrize("shape", CONV.values(), ids=CONV)
@pytest.mark.parametrize("device", DEVICES)
def test_conv2d(benchmark, device, shape, implementation, monkeypatch):
    benchmark.group = f"conv 3x3 {shape} {device} float32 (IEEE), 90 % sparse, forward + backward"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    channels, side, batch = shape
    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side, device=device)
    mask = torch.rand(channels, channels, 3, 3, device=device) < 0.1
    weight = torch.randn(channels, channels, 3, 3, device=device).masked_fill(~mask, 0)

    def dense(x, w):
        return F.conv2d(x, w, padding=1)

    ops = {
        "dense": dense,
        "dense-times-mask": lambda x, w: dense(x, w * mask),
        "granet": lambda x, w: granet_kernels.conv2d(x, w, mask, padding=1),
    }
    run = forward_backward(ops[implementation], x, weight)
    check(run, dense, x, weight, mask)
    benchmark.pedantic(synchronized(run, device), rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("implementation", ["torch.topk", "torch.kthvalue", "granet"])
@pytest.mark.parametrize("units", [1_000_000])
@pytest.mark.parametrize("device", DEVICES)
def test_topk(benchmark, device, units, implementation):
    benchmark.group = f"keep 10 % of {units:,} scores, {device}"
    torch.manual_seed(0)
    scores, k = torch.rand(units, device=device), units // 10
    ops = {
        "torch.topk": lambda: torch.topk(scores, k).indices,
        "torch.kthvalue": lambda: torch.kthvalue(scores, units - k + 1).values,
        "granet": lambda: granet_kernels.topk_mask(scores, k),
    }
    mask = granet_kernels.topk_mask(scores, k)
    assert int(mask.sum()) == k
    assert bool((scores[mask].min() >= scores[~mask].max()).item())
    benchmark.pedantic(synchronized(ops[implementation], device), rounds=7, warmup_rounds=1)
