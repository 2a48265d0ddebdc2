"""Both gradients in one native call: the bits of the two ops, whatever the plan and the number of threads."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import GEOMETRIES, ISAS, LAYOUTS, LINEAR, SPARSITIES

import granet_kernels
from granet_kernels import plan
from granet_kernels.conv2d import conv2d_op
from granet_kernels.cpu_backend import library, memory
from granet_kernels.linear import linear_op

OPS = torch.ops.granet
pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="no native library")
# Many images, so that threads share them; tiles of whole images, bands, and blocks of channels occur.
MANY = {"70x64-4-3x3": (70, 64, 4, 3), "130x40-8-1x1": (130, 40, 8, 1), "64x33-2-3x3": (64, 33, 2, 3)}
GEOMETRY = (1, 1), (0, 0), (1, 1), 1


@pytest.fixture(autouse=True)
def _native_and_nan_in_new_memory():
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    memory.empty((1 << 22,)).fill_(torch.nan)  # what the kernels work in, too
    with plan.use("native"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def assert_same_bits_as_conv_ops(x, grad, weight, mask, rest):
    rest = [*map(list, rest), 1]
    expected = OPS.conv2d_dgrad(grad, weight, mask, x.shape, *rest, None), OPS.conv2d_wgrad(grad, x, mask, *rest, None)
    with torch.no_grad():
        both = conv2d_op.gradients(grad, x, weight, mask, *rest, None)
    for own, theirs in zip(both, expected, strict=True):
        assert torch.equal(own, theirs)
        assert own.stride() == theirs.stride()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv2d(name, sparsity, layout, threads, random_mask):
    torch.set_num_threads(threads)
    x, grad, weight, mask, _, rest = cases.conv_operands(random_mask, name, sparsity, layout)
    assert_same_bits_as_conv_ops(x, grad, weight, mask, rest)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sparsity", [0.5, 0.98])
@pytest.mark.parametrize("sizes", MANY.values(), ids=MANY)
def test_conv2d_of_many_images(sizes, sparsity, isa, random_mask, isa_used):
    n, channels, side, kernel = sizes
    x, grad = torch.randn(n, channels, side, side), torch.randn(n, 48, side, side)
    weight, mask = torch.randn(48, channels, kernel, kernel), random_mask((48, channels, kernel, kernel), 1 - sparsity)
    torch.set_num_threads(2)
    with isa_used(isa):
        assert_same_bits_as_conv_ops(x, grad, weight, mask, [(1, 1), (kernel // 2,) * 2, (1, 1)])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("sizes", LINEAR.values(), ids=LINEAR)
def test_linear(sizes, sparsity, threads, isa, random_mask, isa_used):
    torch.set_num_threads(threads)
    x, grad, weight, mask, _ = cases.linear_operands(random_mask, sizes, sparsity)
    with isa_used(isa), torch.no_grad():
        both = linear_op.gradients(grad, x, weight, mask, None)
        assert torch.equal(both[0], OPS.linear_dgrad(grad, weight, mask, None))
        assert torch.equal(both[1], OPS.linear_wgrad(grad, x, mask, None))


@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_share_rows(threads, random_mask):
    torch.set_num_threads(threads)
    mask = random_mask((20, 24), 0.4).repeat_interleave(4, 0).repeat_interleave(4, 1)
    x, grad, weight = torch.randn(130, 96), torch.randn(130, 80), torch.randn(80, 96)
    with torch.no_grad():
        both = linear_op.gradients(grad, x, weight, mask, None)
    assert torch.equal(both[0], OPS.linear_dgrad(grad, weight, mask, None))
    assert torch.equal(both[1], OPS.linear_wgrad(grad, x, mask, None))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1024, 1024), (1030, 1040), (1100, 961), (16, 65600), (3, 400_000)], ids=str)
def test_gradients_larger_than_what_a_cache_keeps(shape, isa, random_mask, isa_used, assert_as_accurate):
    mask = random_mask(shape, 0.02)
    x, grad = torch.randn(18, shape[1]), torch.randn(18, shape[0])
    with isa_used(isa):
        w_grad = OPS.linear_wgrad(grad, x, mask, None)
    expected = torch.where(mask, grad.t() @ x, 0)
    assert torch.equal(w_grad != 0, expected != 0)
    assert_as_accurate(w_grad, expected, torch.where(mask, grad.double().t() @ x.double(), 0))


def layer(mask):
    x, weight = torch.randn(9, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    return x, weight, lambda: granet_kernels.linear(x, weight, mask).square().sum()


@pytest.fixture
def calls(monkeypatch):
    """How many times both gradients were computed at once."""
    done = []
    both = linear_op._gradients["cpu"]
    monkeypatch.setitem(linear_op._gradients, "cpu", lambda *args: done.append(1) or both(*args))
    return done


def test_the_backward_pass_takes_it(calls, random_mask):
    mask = random_mask((5, 6), 0.5)
    x, weight, loss = layer(mask)
    loss().backward()
    assert calls == [1]
    assert {way: name for way, (name, _) in plan.report(mask).items()} == dict.fromkeys(plan.DIRECTIONS, "native")
    y = x @ (weight * mask).t()
    x_grad, w_grad = torch.autograd.grad(y.square().sum(), (x, weight))
    torch.testing.assert_close(x.grad, x_grad)
    torch.testing.assert_close(weight.grad, w_grad * mask)


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_not_where_one_gradient_is_wanted(wanted, calls, random_mask):
    x, weight, loss = layer(random_mask((5, 6), 0.5))
    (weight if wanted == "x" else x).requires_grad_(False)
    loss().backward()
    assert calls == []


def test_not_where_gradients_are_differentiated_again(calls, random_mask):
    x, weight, loss = layer(random_mask((5, 6), 0.5))
    (x_grad,) = torch.autograd.grad(loss(), x, create_graph=True)
    assert calls == []
    x_grad.sum().backward()
    assert weight.grad.count_nonzero() > 0


def test_the_dense_gradient_is_for_the_op(random_mask):
    mask, flag = random_mask((5, 6), 0.5), torch.tensor(True)
    x, grad, weight = torch.randn(9, 6), torch.randn(9, 5), torch.randn(5, 6)
    with torch.no_grad():
        assert linear_op.gradients(grad, x, weight, mask, flag) is None
        operands = grad[..., None, None], x[..., None, None], weight[..., None, None], mask[..., None, None]
        assert conv2d_op.gradients(*operands, *GEOMETRY, flag) is None
        assert conv2d_op.gradients(*operands, *GEOMETRY, ~flag) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_for_the_ops(dtype, random_mask):
    mask, weight = random_mask((5, 6), 0.5), torch.randn(5, 6).to(dtype)
    with torch.no_grad():
        assert linear_op.gradients(*(torch.randn(9, c).to(dtype) for c in (5, 6)), weight, mask, None) is None


def test_another_kernel_for_a_while(calls, random_mask):
    *_, loss = layer(random_mask((5, 6), 0.5))
    with linear_op.computed_by("cpu", linear_op.reference):
        loss().backward()
    assert calls == []
    loss().backward()
    assert calls == [1]


def test_a_measured_plan_goes_on_measuring(random_mask):
    """Every sixteenth call is for the ops, which are timed; the others count."""
    mask = random_mask((600, 500), 0.02)
    x, weight = torch.randn(64, 500, requires_grad=True), torch.randn(600, 500, requires_grad=True)
    plan.clear()
    with plan.use("measured"):
        for _ in range(64):
            granet_kernels.linear(x, weight, mask).sum().backward()
    assert plan.summary().calls == 3 * 64
    assert set(plan.report(mask)) == set(plan.DIRECTIONS)
    assert plan.speedup(mask) is not None


def test_what_the_library_does_not_support_is_for_the_ops(monkeypatch, random_mask):
    class Refusing:
        granet_conv2d_backward = staticmethod(lambda *arguments: 2)

        def __getattr__(self, name):
            return getattr(real, name)

    real, mask = library.load(), random_mask((5, 6), 0.5)
    monkeypatch.setattr(library, "load", Refusing)
    with torch.no_grad():
        assert linear_op.gradients(torch.randn(9, 5), torch.randn(9, 6), torch.randn(5, 6), mask, None) is None
