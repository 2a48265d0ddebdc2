"""Ops called with plain tensors go past the dispatcher: the same bits, and everything that watches still sees them."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import granet_kernels
from granet_kernels import linear, plan
from granet_kernels.conv2d import conv2d_dgrad_op, conv2d_op, conv2d_wgrad_op
from granet_kernels.linear import linear_dgrad_op, linear_op, linear_wgrad_op
from granet_kernels.norm import norm_op
from granet_kernels.op import Op
from granet_kernels.pool import max_pool_op

OPS = torch.ops.granet


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def mask(*shape):
    return torch.rand(shape) < 0.5


GEOMETRY = ((2, 1), (1, 2), (1, 1), 1)
CASES = {
    "linear": (linear_op, OPS.linear, lambda: (leaf(7, 5), leaf(3, 5), mask(3, 5), leaf(3), None)),
    "linear_dgrad": (linear_dgrad_op, OPS.linear_dgrad, lambda: (leaf(7, 3), leaf(3, 5), mask(3, 5), None)),
    "linear_wgrad": (linear_wgrad_op, OPS.linear_wgrad, lambda: (leaf(7, 3), leaf(7, 5), mask(3, 5), None)),
    "conv2d": (
        conv2d_op,
        OPS.conv2d,
        lambda: (leaf(2, 3, 7, 6), leaf(4, 3, 3, 2), mask(4, 3, 3, 2), leaf(4), *GEOMETRY, torch.tensor(False)),
    ),
    "conv2d_dgrad": (
        conv2d_dgrad_op,
        OPS.conv2d_dgrad,
        lambda: (leaf(2, 4, 4, 9), leaf(4, 3, 3, 2), mask(4, 3, 3, 2), (2, 3, 7, 6), *GEOMETRY, None),
    ),
    "conv2d_wgrad": (
        conv2d_wgrad_op,
        OPS.conv2d_wgrad,
        lambda: (leaf(2, 4, 4, 9), leaf(2, 3, 7, 6), mask(4, 3, 3, 2), *GEOMETRY, torch.tensor(True)),
    ),
    "norm": (norm_op, OPS.norm, lambda: (leaf(2, 3, 4, 5), leaf(3), leaf(3), leaf(2, 3, 4, 5), 1e-5, True)),
    "max_pool": (max_pool_op, OPS.max_pool, lambda: (leaf(2, 3, 4, 5),)),
}


def derivatives(op, operands):
    """The results, their gradients, and the gradients of those."""
    leaves = [operand for operand in operands if isinstance(operand, torch.Tensor) and operand.requires_grad]
    results = op(*operands)
    results = [results] if isinstance(results, torch.Tensor) else list(results)
    first = torch.autograd.grad(results[0].square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
    return [*results, *first, *second]


@pytest.fixture(params=CASES)
def case(request):
    """The Op, the op of the dispatcher, and operands."""
    op, dispatched, draw = CASES[request.param]
    return op, dispatched.default, draw()


@pytest.fixture
def seen(monkeypatch):
    """Which calls the dispatcher got."""
    calls = []

    def watch(op):
        inner = op._op
        monkeypatch.setattr(op, "_op", lambda *operands: calls.append(op) or inner(*operands))
        return calls

    return watch


def test_the_bits_of_the_dispatcher(case, seen):
    op, dispatched, operands = case
    expected = derivatives(dispatched, operands)
    calls = seen(op)
    got = derivatives(op, operands)
    assert calls == []
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.stride() == b.stride())


def test_without_a_gradient(case, seen):
    op, dispatched, operands = case
    calls = seen(op)
    with torch.no_grad():
        results, expected = op(*operands), dispatched(*operands)
    assert calls == []
    for a, b in zip(*([r] if isinstance(r, torch.Tensor) else r for r in (results, expected)), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_a_mode_sees_the_op(case, seen):
    op, _, operands = case
    calls = seen(op)
    with Watch():
        op(*operands)
    assert calls == [op]


def test_a_profiler_sees_the_op(case):
    op, dispatched, operands = case
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        op(*operands)
    assert dispatched.name() in {event.name for event in profiler.events()}


def test_a_subclass_reaches_the_dispatcher(case, seen):
    op, _, operands = case
    calls = seen(op)
    op(operands[0].as_subclass(Subclass), *operands[1:])
    assert calls == [op]


def test_meta_tensors_have_shapes_alone(case, seen):
    op, _, operands = case
    calls = seen(op)
    flags = {id(operand) for operand in operands if isinstance(operand, torch.Tensor) and operand.dim() == 0}
    moved = [o.to("meta") if isinstance(o, torch.Tensor) and id(o) not in flags else o for o in operands]
    results, expected = op(*moved), op(*operands)
    assert calls == [op]
    for a, b in zip(*([r] if isinstance(r, torch.Tensor) else r for r in (results, expected)), strict=True):
        assert a.device.type == "meta"
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_forward_mode_is_refused():
    x, weight, where, bias, _ = CASES["linear"][2]()
    with pytest.raises(NotImplementedError, match=r"expected reverse-mode differentiation, got torch\.func\.jvp"):
        torch.func.jvp(lambda t: linear_op(t, weight, where, bias, None), (x.detach(),), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        linear_op(forward_ad.make_dual(x.detach(), torch.ones_like(x)), weight, where, bias, None)


def test_a_weight_changed_before_the_backward_pass():
    x, weight, where, bias, _ = CASES["linear"][2]()
    y = linear_op(x, weight, where, bias, None)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensors_can_be_packed():
    x, weight, where, bias, _ = CASES["linear"][2]()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        linear_op(x, weight, where, bias, None)
    assert packed == [x.shape, weight.shape, where.shape]


BATCHED = {
    "linear": lambda: (leaf32(7, 5), leaf32(3, 5), mask(3, 5), leaf32(3)),
    "conv2d": lambda: (leaf32(2, 3, 7, 6), leaf32(4, 3, 3, 2), mask(4, 3, 3, 2), leaf32(4), *GEOMETRY),
    "norm": lambda: (leaf32(2, 3, 4, 5), leaf32(3), leaf32(3), leaf32(2, 3, 4, 5), 1e-5, True),
    "max_pool": lambda: (leaf32(2, 3, 4, 5),),
}


def leaf32(*shape):
    return torch.randn(shape).requires_grad_()


@pytest.mark.parametrize("mode", ["native", "dense"])
@pytest.mark.parametrize("name", BATCHED)
def test_batches_of_gradients(name, mode):
    operands = BATCHED[name]()
    leaves = [operand for operand in operands if isinstance(operand, torch.Tensor) and operand.requires_grad]
    with plan.use(mode):
        y = getattr(granet_kernels, name)(*operands)
        y = y[0] if name == "norm" else y
        grads = torch.randn(3, *y.shape)
        batch = torch.autograd.grad(y, leaves, grads, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(y, leaves, grad, retain_graph=True) for grad in grads]
    for together, alone in zip(batch, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(together, torch.stack(alone))


def test_what_a_transform_has_left_behind():
    """torch.func wraps tensors, and one that outlives its transform stays wrapped."""
    kept = []
    torch.func.grad(lambda x: kept.append(x * 1) or x.sum())(torch.randn(9, 33))
    mask = torch.rand(17, 33) < 0.5
    weight = torch.randn(17, 33).where(mask, 0)
    with plan.use("native"):
        for _ in range(2):
            torch.testing.assert_close(linear(kept[0], weight, mask), kept[0] @ weight.t())


def test_another_kernel_for_a_while():
    op = Op("granet::test_double", lambda x: x * 2, "(Tensor x) -> Tensor")
    x = torch.ones(2)
    with op.computed_by("cpu", lambda x: x * 3):
        assert op(x).tolist() == [3, 3]
        assert OPS.test_double(x).tolist() == [3, 3]
    assert op(x).tolist() == [2, 2]
    assert OPS.test_double(x).tolist() == [2, 2]
