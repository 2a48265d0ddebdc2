from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from granet_kernels import linear

OPS = torch.ops.granet
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def gradients(function, x, weight, bias, cotangent):
    """(y, x gradient, weight gradient, bias gradient) of function(x, weight, bias)."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, cotangent)


def test_hand_worked():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 10.0], [100.0, 1000.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, True]])
    bias = torch.tensor([0.5, 0.25], requires_grad=True)

    y = linear(x, weight, mask, bias)
    y.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

    assert y.tolist() == [[1.5, 2000.25], [3.5, 4000.25]]
    assert x.grad.tolist() == [[1.0, 2000.0], [3.0, 4000.0]]
    assert weight.grad.tolist() == [[1 * 1 + 3 * 3, 0.0], [0.0, 2 * 2 + 4 * 4]]
    assert bias.grad.tolist() == [4.0, 6.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("density", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize(("n", "inner", "out"), [(1, 1, 1), (7, 63, 100), (100, 13, 67)])
def test_as_accurate_as_masked_dense(n, inner, out, density, dtype, random_mask, assert_as_accurate):
    mask = random_mask((out, inner), density)
    operands = [torch.randn(shape).to(dtype) for shape in ((n, inner), (out, inner), (out,), (n, out))]

    def dense(x, weight, bias):
        return F.linear(x, weight * mask, bias)

    actual = gradients(lambda x, w, b: linear(x, w, mask, b), *operands)
    torchs = gradients(dense, *operands)
    exact = gradients(dense, *[t.double() for t in operands])

    for three in zip(actual, torchs, exact, strict=True):
        assert_as_accurate(*three)
    assert actual[2][~mask].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 5), (2, 3, 5), (2, 0, 3, 5)], ids=str)
def test_leading_dimensions(shape, random_mask):
    mask = random_mask((4, 5), 0.5)
    operands = torch.randn(shape), torch.randn(4, 5), torch.randn(4), torch.randn(*shape[:-1], 4)
    actual = gradients(lambda x, w, b: linear(x, w, mask, b), *operands)
    expected = gradients(lambda x, w, b: F.linear(x, w * mask, b), *operands)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_strided_operands(random_mask):
    mask = random_mask((5, 4), 0.5).t()
    operands = torch.randn(5, 6).t()[::2], torch.randn(5, 4).t(), torch.randn(8)[::2], torch.randn(1, 1).expand(3, 4)
    actual = gradients(lambda x, w, b: linear(x, w, mask, b), *operands)
    expected = gradients(lambda x, w, b: F.linear(x, w * mask, b), *operands)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert actual[2].stride() == mask.stride()


def test_nothing_off_the_mask_matters():
    weight = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]], requires_grad=True)
    mask = torch.eye(2, dtype=torch.bool)
    x = torch.ones(1, 2, requires_grad=True)
    y = linear(x, weight, mask)
    y.sum().backward()
    assert y.tolist() == [[1.0, 2.0]]
    assert x.grad.tolist() == [[1.0, 2.0]]
    assert weight.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_gradient_stays_zero_off_the_mask_when_it_overflows():
    weight = torch.ones(2, 2, requires_grad=True)
    linear(torch.full((1, 2), float("inf")), weight, torch.eye(2, dtype=torch.bool)).sum().backward()
    assert weight.grad.tolist() == [[float("inf"), 0.0], [0.0, float("inf")]]


@pytest.mark.parametrize(("forward", "backward"), [*itertools.product([False, True], repeat=2)])
def test_flag_counts_when_backward_runs(forward, backward):
    x, weight, mask = torch.randn(3, 5), torch.randn(4, 5, requires_grad=True), torch.zeros(4, 5, dtype=torch.bool)
    flag = torch.tensor(forward)
    y = linear(x, weight, mask, dense_wgrad=flag)
    flag.fill_(backward)
    y.sum().backward()
    expected = torch.ones(4, 3) @ x if backward else torch.zeros(4, 5)
    torch.testing.assert_close(weight.grad, expected)
    assert y.count_nonzero() == 0


@pytest.mark.parametrize("needed", [*itertools.product([False, True], repeat=3)][1:], ids=str)
def test_backward_runs_only_what_is_needed(needed, random_mask, recorded_ops):
    operands = [torch.randn(s).requires_grad_(r) for s, r in zip([(3, 5), (4, 5), (4,)], needed, strict=True)]
    x, weight, bias = operands
    y = linear(x, weight, random_mask((4, 5), 0.5), bias)
    with recorded_ops() as record:
        torch.autograd.grad(y, [t for t in operands if t.requires_grad], torch.ones_like(y))
    names = ["granet.linear_dgrad", "granet.linear_wgrad", "aten.sum.dim_IntList"]
    assert [name for name in record.names if name != "aten.ones_like"] == list(itertools.compress(names, needed))


@pytest.mark.parametrize("density", [0, 0.5, 1])
@pytest.mark.parametrize("shape", [(3, 4), (4,), (0, 4)], ids=str)
def test_gradcheck_twice(shape, density, random_mask):
    mask = random_mask((5, 4), density)
    operands = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (shape, (5, 4), (5,))]

    def function(x, weight, bias):
        return linear(x, weight, mask, bias)

    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


@pytest.mark.parametrize("dense", [None, False, True])
def test_gradient_penalty(dense, random_mask):
    """A second-order term also delivers the dense gradient while the flag is true, as if W were the parameter."""
    mask = random_mask((5, 4), 0.5)
    flag = None if dense is None else torch.tensor(dense)

    def straight_through(x, weight):
        return F.linear(x, weight + (weight * mask - weight).detach() if dense else weight * mask)

    def penalty_gradient(function):
        x = torch.arange(12.0, dtype=torch.float64).reshape(3, 4).requires_grad_()
        weight = torch.arange(20.0, dtype=torch.float64).reshape(5, 4).requires_grad_()
        loss = function(x, weight).tanh().sum()
        first = torch.autograd.grad(loss, (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    actual = penalty_gradient(lambda x, weight: linear(x, weight * 1e-2, mask, None, flag))
    expected = penalty_gradient(lambda x, weight: straight_through(x, weight * 1e-2))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("flag", [None, False, True])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_opcheck(n, flag, dtype, random_mask):
    mask = random_mask((6, 5), 0.5)
    dense = None if flag is None else torch.tensor(flag)
    x = torch.randn(n, 5, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    bias = torch.randn(6, dtype=dtype, requires_grad=True)
    grad = torch.randn(n, 6, dtype=dtype, requires_grad=True)
    torch.library.opcheck(OPS.linear.default, (x, weight, mask, bias if flag else None, dense))
    torch.library.opcheck(OPS.linear_dgrad.default, (grad, weight, mask, dense))
    torch.library.opcheck(OPS.linear_wgrad.default, (grad, x, mask, dense))


def test_opcheck_strided(random_mask):
    mask = random_mask((5, 6), 0.5).t()
    x = torch.randn(5, 6).t()[::2].requires_grad_()
    weight = torch.randn(5, 6).t().requires_grad_()
    grad = torch.randn(6, 1).expand(6, 3).t().requires_grad_()
    torch.library.opcheck(OPS.linear.default, (x, weight, mask, None, None))
    torch.library.opcheck(OPS.linear_dgrad.default, (grad, weight, mask, None))
    torch.library.opcheck(OPS.linear_wgrad.default, (grad, x, mask, torch.tensor(True)))


def test_compiled_once_for_all_masks_and_flags(random_mask, compiled_once):
    flag, mask = torch.tensor(False), random_mask((6, 5), 0.5)
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 3, 5), (6, 5), (6,)))

    def step(x, weight, bias, mask, flag):
        return linear(x, weight, mask, bias, flag).square().sum()

    compiled = compiled_once(step)
    for i in range(10):
        mask.copy_(random_mask((6, 5), i / 10))
        flag.fill_(i % 3 == 0)
        actual = torch.autograd.grad(compiled(x, weight, bias, mask, flag), (x, weight, bias))
        expected = torch.autograd.grad(step(x, weight, bias, mask, flag), (x, weight, bias))
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)], ids=str)
def test_flops_are_the_dense_ones(shape, random_mask):
    def count(function):
        x, weight = torch.randn(shape, requires_grad=True), torch.randn(6, 5, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            function(x, weight).sum().backward()
        return counter.get_total_flops()

    rows = torch.Size(shape[:-1]).numel()
    assert count(lambda x, w: linear(x, w, random_mask((6, 5), 0.5))) == 3 * 2 * rows * 5 * 6
    if len(shape) > 1:
        assert count(lambda x, w: linear(x, w, random_mask((6, 5), 0.5))) == count(F.linear)


BAD = {
    "weight dtype": ({"weight": torch.ones(4, 3, dtype=torch.int32)}, "expected weight of dtype .*, got torch.int32"),
    "weight 1-D": (
        {"weight": torch.ones(3), "mask": torch.ones(3).bool(), "bias": None},
        r"weight of shape \(out, in\), got .*\(3,\)",
    ),
    "x dtype": ({"x": torch.ones(2, 3).double()}, "expected x of dtype torch.float32, got torch.float64"),
    "x device": ({"x": torch.ones(2, 3, device="meta")}, "expected x on device cpu, got one on meta"),
    "x width": ({"x": torch.ones(2, 4)}, r"expected x of shape \(..., 3\), got shape \(2, 4\)"),
    "x 0-D": ({"x": torch.ones(())}, r"expected x of shape \(..., 3\), got shape \(\)"),
    "mask dtype": ({"mask": torch.ones(4, 3)}, "expected mask of dtype torch.bool, got torch.float32"),
    "mask shape": (
        {"mask": torch.ones(3, 4).bool()},
        r"expected mask of the weight's shape \(4, 3\), got shape \(3, 4\)",
    ),
    "mask device": ({"mask": torch.ones(4, 3, device="meta").bool()}, "expected mask on device cpu, got one on meta"),
    "bias dtype": ({"bias": torch.ones(4).half()}, "expected bias of dtype torch.float32, got torch.float16"),
    "bias shape": ({"bias": torch.ones(3)}, r"expected bias of shape \(4,\), got shape \(3,\)"),
    "flag type": ({"dense_wgrad": True}, "expected dense_wgrad to be None or a 0-dim bool tensor, got True"),
    "flag dtype": ({"dense_wgrad": torch.tensor(1)}, "expected dense_wgrad .* got shape .*torch.int64 on cpu"),
    "flag shape": ({"dense_wgrad": torch.tensor([True])}, r"expected dense_wgrad .* got shape \(1,\)"),
    "flag device": ({"dense_wgrad": torch.ones((), device="meta").bool()}, "expected dense_wgrad .* on meta"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(change, message):
    good = {"x": torch.ones(2, 3), "weight": torch.ones(4, 3), "mask": torch.ones(4, 3).bool(), "bias": torch.ones(4)}
    with pytest.raises(ValueError, match=f"linear: .*{message}"):
        linear(**{**good, **change})
