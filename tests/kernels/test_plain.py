"""Layers that run densely go past the ops, and nobody can tell but by the clock."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from granet_kernels import conv2d, eager, linear, plain, plan
from granet_kernels.cpu_backend import library
from granet_kernels.cpu_backend.calls import find_call
from granet_kernels.layout import layout_of

# The functions of the same names hide them.
LINEAR, CONV2D = import_module("granet_kernels.linear"), import_module("granet_kernels.conv2d")
GEOMETRY = ((2, 1), (1, 2), (1, 1), 1)


@pytest.fixture(autouse=True)
def _densely():
    with plan.use("dense"):
        yield


@pytest.fixture
def no_ops(monkeypatch):
    def called(*args):
        raise AssertionError("an op was called")

    monkeypatch.setattr(LINEAR.linear_op, "run", called)
    monkeypatch.setattr(CONV2D.conv2d_op, "run", called)


def operands(mask, dtype, x_shape, strided=False, zeroed=False):
    weight = torch.randn(mask.shape, dtype=dtype)
    if zeroed:
        weight = weight.where(mask, 0)
    if strided:
        weight = torch.empty(mask.shape[::-1], dtype=dtype).permute(*reversed(range(mask.dim()))).copy_(weight)
    tensors = torch.randn(x_shape, dtype=dtype), weight, torch.randn(mask.shape[0], dtype=dtype)
    return [tensor.requires_grad_() for tensor in tensors]


def results(layer, x, weight, bias, mask, flag):
    y = layer(x, weight, mask, bias, flag)
    return [y, *torch.autograd.grad(y, (x, weight, bias), torch.linspace(-1, 1, y.numel()).to(y.dtype).view(y.shape))]


def through_op(name):
    if name == "linear":
        return LINEAR.linear_op
    op = CONV2D.conv2d_op
    return lambda x, weight, mask, bias, flag: op(x, weight, mask, bias, *GEOMETRY, flag)


def public(name):
    if name == "linear":
        return linear
    return lambda x, weight, mask, bias, flag: conv2d(x, weight, mask, bias, *GEOMETRY, flag)


SHAPES = {"linear": ((9, 33), (17, 33)), "conv2d": ((3, 5, 7, 8), (6, 5, 3, 2))}


@pytest.mark.parametrize("flag", [None, False, True], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.6, 1.0], ids=str)
@pytest.mark.parametrize("zeroed", [False, True], ids=["", "zero off the mask"])
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_as_the_op(name, dtype, strided, zeroed, density, flag, random_mask, request):
    x_shape, w_shape = SHAPES[name]
    mask = random_mask(w_shape, density)
    tensors = operands(mask, dtype, x_shape, strided, zeroed)
    wanted = None if flag is None else torch.tensor(flag)
    with plan.use("dense"):
        expected = results(through_op(name), *tensors, mask, wanted)
    request.getfixturevalue("no_ops")
    got = results(public(name), *tensors, mask, wanted)
    for a, b in zip(got, expected, strict=True):
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=16 * tolerance)
    if not flag:
        assert got[2][~mask].count_nonzero() == 0


@pytest.fixture
def on_gpu(device, monkeypatch):
    """Moves tensors to a GPU; without one, layers go the way that they would go there."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    if device == "cpu":

        def weight(op, x, weight, mask, bias, flag, geometry=(), given=None):
            return plain._weight_on_gpu(op, x, weight, mask, flag)

        monkeypatch.setattr(plain, "_weight", weight)
    return lambda *tensors: [tensor.detach().to(device).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("flag", [None, False, True], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.6, 1.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_as_the_op_on_a_gpu(name, dtype, density, flag, random_mask, on_gpu, device, request):
    x_shape, w_shape = SHAPES[name]
    mask = random_mask(w_shape, density)
    tensors = operands(mask, torch.float64, x_shape)
    wanted = None if flag is None else torch.tensor(flag)
    expected = results(through_op(name), *tensors, mask, wanted)
    request.getfixturevalue("no_ops")
    tensors = on_gpu(*(tensor.to(dtype) for tensor in tensors))
    got = results(public(name), *tensors, mask.to(device), wanted)
    for a, b in zip(got, expected, strict=True):
        tolerance = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=4 * tolerance)
    if not flag:
        assert got[2].cpu()[~mask].count_nonzero() == 0


def test_a_gpu_follows_the_mask_and_the_flag(random_mask, on_gpu, device, no_ops):
    mask, flag = random_mask((17, 33), 0.6).to(device), torch.tensor(False)
    x, weight, bias = on_gpu(*operands(mask, torch.float32, (9, 33)))
    for _ in range(2):
        assert torch.equal(linear(x, weight, mask, bias), F.linear(x, weight.where(mask, 0), bias))
        mask.logical_not_()
    y = linear(x, weight, mask, bias, flag)
    flag.fill_(True)
    y.sum().backward()
    assert weight.grad[~mask].count_nonzero() > 0


def test_large_layers_call_ops_on_a_gpu(random_mask, on_gpu, device):
    mask = random_mask((1024, 300), 0.6).to(device)
    x, weight, _ = on_gpu(*operands(mask, torch.float32, (4, 300)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LINEAR.linear_op, "run", lambda *operands: "op")
        assert linear(x, weight, mask) == "op"  # a masked copy would count


@pytest.mark.parametrize("name", SHAPES)
def test_as_the_op_under_autocast(name, random_mask, no_ops):
    x_shape, w_shape = SHAPES[name]
    mask = random_mask(w_shape, 0.6)
    tensors = operands(mask, torch.bfloat16, x_shape)
    expected = results(public(name), *tensors, mask, None)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(public(name), *tensors, mask, None)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SHAPES)
def test_every_order_of_gradient(name, random_mask, no_ops):
    x_shape, w_shape = SHAPES[name]
    mask = random_mask(w_shape, 0.6)
    tensors = operands(mask, torch.float64, x_shape)

    def layer(x, weight, bias):
        return public(name)(x, weight * 1, mask, bias, None)  # a weight of which gradcheck may change every entry

    def masked(x, weight, bias):
        return layer(x, torch.where(mask, weight, 0), bias)

    assert torch.autograd.gradcheck(masked, tensors)
    assert torch.autograd.gradgradcheck(masked, tensors)


def test_the_flag_is_read_in_the_backward_pass(random_mask, no_ops):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask, torch.float32, (9, 33))
    flag = torch.tensor(False)
    y = linear(x, weight, mask, bias, flag)
    flag.fill_(True)
    y.sum().backward()
    assert weight.grad[~mask].count_nonzero() > 0


def test_a_mask_changed_before_the_backward_pass(random_mask, no_ops):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask, torch.float32, (9, 33))
    y = linear(x, weight, mask, bias)
    mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_channels_last_stays(random_mask, no_ops):
    mask = random_mask((6, 5, 3, 3), 0.6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = conv2d(torch.randn(2, 5, 8, 8), weight, mask)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad.stride() == mask.stride()


@pytest.mark.skipif(library.load() is None, reason="no native library")
def test_ops_where_native_code_may_win(random_mask):
    mask = random_mask((512, 300), 0.1)
    x, weight, _ = operands(mask, torch.float32, (400, 300))
    with plan.use("rule"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(LINEAR.linear_op, "run", lambda *operands: "op")
        assert linear(x, weight, mask) == "op"  # the rule says native
        with plan.use("native"):
            assert linear(x[:1], weight, mask) == "op"
        with plan.use("dense"):
            assert isinstance(linear(x, weight, mask), torch.Tensor)
        large = random_mask((1024, 300), 0.6)
        assert linear(x, torch.randn(1024, 300), large) == "op"  # a masked copy would count
        assert isinstance(linear(x, torch.randn(1024, 300).where(large, 0), large), torch.Tensor)
        patch.setattr(CONV2D.conv2d_op, "run", lambda *operands: "op")
        large = random_mask((1024, 300, 1, 1), 0.6)
        assert conv2d(torch.randn(2, 300, 3, 3), torch.zeros(1024, 300, 1, 1), large) == "op"


@pytest.mark.skipif(library.load() is None, reason="no native library")
def test_a_weight_is_not_looked_at_where_native_code_runs(random_mask, monkeypatch):
    mask = random_mask((512, 300), 0.1)
    x, weight, _ = operands(mask, torch.float32, (400, 300), zeroed=True)
    monkeypatch.setattr(plain.dense, "is_zero_off", None)
    with plan.use("rule"):
        linear(x, weight, mask).sum().backward()


@pytest.mark.skipif(library.load() is None, reason="no native library")
def test_a_measured_plan_learns_from_ops_first(random_mask):
    mask = random_mask((512, 300), 0.99)
    x, weight, _ = operands(mask, torch.float32, (400, 300))
    calls = []
    run = LINEAR.linear_op.run
    with plan.use("measured"), pytest.MonkeyPatch.context() as patch:
        plan.clear()
        patch.setattr(LINEAR.linear_op, "run", lambda *operands: calls.append(1) or run(*operands))
        y = linear(x, weight, mask)
        assert len(calls) == 1
        for site in _sites(x, weight, mask):
            site.choices[layout_of(mask).bucket] = "dense"
        y = linear(x, weight, mask)
        y.sum().backward()
        assert len(calls) == 1
        for _ in range(64):
            linear(x, weight, mask)
        assert len(calls) == 2  # now and then it looks again
        plan.clear()


@pytest.mark.skipif(library.load() is None, reason="no native library")
@pytest.mark.parametrize("old_torch", [False, True])
@pytest.mark.parametrize("density", [0.9, 1.0])
def test_checkpoints_take_one_way(density, old_torch, random_mask, monkeypatch):
    """Forward passes are repeated, and have to save what they saved, though now and then the plan looks again."""
    if old_torch:  # before 2.8 nothing tells of the hooks
        monkeypatch.setattr(eager, "_top_hooks", None)
    mask = random_mask((64, 64), density)
    x, weight, _ = operands(mask, torch.float32, (64, 64))
    grad = torch.randn(64, 64)
    (expected,) = torch.autograd.grad(linear(x, weight, mask), x, grad)
    with plan.use("measured"):
        plan.clear()
        for site in _sites(x, weight, mask):
            site.choices[layout_of(mask).bucket] = "dense"
        for _ in range(130):
            y = checkpoint(linear, x, weight, mask, use_reentrant=False)
            torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected)
        plan.clear()


def _sites(x, weight, mask):
    call = find_call("linear", "forward", x, weight, mask)
    return [call.site, *call.partners.values()]


def test_the_plan_knows_what_ran(random_mask):
    if library.load() is None:
        pytest.skip("no choice, and so no notes, without the library")
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask, torch.float32, (9, 33))
    linear(x, weight, mask, bias)
    assert {way: name for way, (name, _) in plan.report(mask).items()} == dict.fromkeys(plan.DIRECTIONS, "dense")


def test_whoever_watches_ops_sees_them(random_mask):
    mask = random_mask((17, 33), 1.0)
    with FlopCounterMode(display=False) as counter:
        linear(torch.randn(9, 33), torch.randn(17, 33), mask)
    assert counter.get_flop_counts()["Global"] == {torch.ops.granet.linear: 2 * 9 * 33 * 17}
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(9, 33), torch.randn(17, 33), mask).dtype == torch.float32
