"""Both gradients in one native call: the bits of the two ops, whatever the plan and the number of threads."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import GEOMETRIES, ISAS, LAYOUTS, LINEAR, SPARSITIES
from torch.nn.grad import conv2d_weight

import granet_kernels
from granet_kernels import plan
from granet_kernels.conv2d import conv2d_op
from granet_kernels.cpu_backend import library
from granet_kernels.cpu_backend.calls import find_call
from granet_kernels.layout import layout_of
from granet_kernels.linear import linear_dgrad_op, linear_op, linear_wgrad_op

OPS = torch.ops.granet
pytestmark = [
    pytest.mark.skipif(library.unavailable() is not None, reason="no native library"),
    pytest.mark.usefixtures("natively_with_nan_in_new_memory"),
]
# name: (images, channels, side, kernel, whether the gradients read the incoming one once at 98 %, by 2 and 3 threads).
MANY = {
    "whole images of 4x4": (70, 64, 4, 3, (True, False)),
    "whole images of 2x2": (130, 33, 2, 3, (True, False)),
    "with a border": (70, 16, 7, 3, (True, False)),
    "one tap": (150, 40, 6, 1, (True, True)),
    "nothing to pack": (70, 40, 8, 1, (True, True)),
    "rows of vectors": (70, 16, 16, 3, (True, True)),
    "several bands": (2, 20, 130, 3, (False, False)),
}
GEOMETRY = (1, 1), (0, 0), (1, 1), 1


def reads_once(grad, x, weight, mask, geometry):
    dgrad = find_call("conv2d", "dgrad", grad, weight, mask, None, *geometry, x.shape)
    wgrad = find_call("conv2d", "wgrad", grad, x, mask, None, *geometry)
    operands = layout_of(mask).native, dgrad.conv, dgrad.first, wgrad.second, dgrad.second, dgrad.threads
    return bool(library.load().granet_conv2d_reads_once(*operands))


def assert_same_bits_as_conv_ops(x, grad, weight, mask, rest):
    rest = [*map(list, rest), 1]
    with torch.no_grad():
        both = conv2d_op.gradients(grad, x, weight, mask, *rest, None)
    expected = OPS.conv2d_dgrad(grad, weight, mask, x.shape, *rest, None), OPS.conv2d_wgrad(grad, x, mask, *rest, None)
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
def test_conv2d_by_several_threads(sizes, sparsity, isa, random_mask, isa_used):
    n, channels, side, kernel, once = sizes
    x, grad = torch.randn(n, channels, side, side), torch.randn(n, 48, side, side)
    weight, mask = torch.randn(48, channels, kernel, kernel), random_mask((48, channels, kernel, kernel), 1 - sparsity)
    rest = [(1, 1), (kernel // 2,) * 2, (1, 1)]
    for threads, expected in zip((2, 3), once, strict=True):
        torch.set_num_threads(threads)
        with isa_used(isa):
            assert_same_bits_as_conv_ops(x, grad, weight, mask, rest)
            assert reads_once(grad, x, weight, mask, (*rest, 1)) == expected or sparsity < 0.98 or isa != "avx512"


@pytest.mark.parametrize("name", ["3x3", "1x1", "3x3-dilation", "one-pixel"])
def test_one_thread_reads_once(name, random_mask):
    torch.set_num_threads(1)
    x, grad, weight, mask, _, rest = cases.conv_operands(random_mask, name, 0.5)
    assert reads_once(grad, x, weight, mask, (*rest, 1))


@pytest.mark.parametrize("name", ["3x3-stride", "1x1-padded", "padding-over-kernel"])
def test_no_panel_for_both(name, random_mask):
    """Strides have phases, and much padding leaves pixels of the gradient that the input's does not need."""
    torch.set_num_threads(1)
    x, grad, weight, mask, _, rest = cases.conv_operands(random_mask, name, 0.5)
    assert not reads_once(grad, x, weight, mask, (*rest, 1))


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


def assert_gradient_is_right(w_grad, mask, expected, exact, assert_as_accurate):
    assert torch.equal(w_grad != 0, mask & (expected != 0))
    assert_as_accurate(w_grad, expected * mask, exact * mask)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(1024, 1024), (1032, 1040), (1100, 964), (20, 65_536), (16, 65_600)], ids=str)
def test_gradients_larger_than_what_a_cache_keeps(shape, isa, block, random_mask, isa_used, assert_as_accurate):
    mask = random_mask([size // block for size in shape], 0.02)
    mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    x, grad = torch.randn(18, shape[1]), torch.randn(18, shape[0])
    with isa_used(isa):
        w_grad = OPS.linear_wgrad(grad, x, mask, None)
    assert_gradient_is_right(w_grad, mask, grad.t() @ x, grad.double().t() @ x.double(), assert_as_accurate)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_large_gradients_of_conv2d(memory_format, random_mask, assert_as_accurate):
    mask = random_mask((512, 256, 3, 3), 0.02).contiguous(memory_format=memory_format)
    x, grad = torch.randn(2, 256, 3, 4), torch.randn(2, 512, 3, 4)
    w_grad = OPS.conv2d_wgrad(grad, x, mask, (1, 1), (1, 1), (1, 1), 1, None)
    expected, exact = (conv2d_weight(x.to(d), mask.shape, grad.to(d), padding=1) for d in (x.dtype, torch.float64))
    assert w_grad.stride() == mask.stride()
    assert_gradient_is_right(w_grad, mask, expected, exact, assert_as_accurate)


def layer(mask):
    x, weight = torch.randn(9, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    return x, weight, lambda: granet_kernels.linear(x, weight, mask).square().sum()


@pytest.fixture
def calls(monkeypatch):
    """How many times both gradients were computed at once."""
    done = []

    def counting(both):
        def counted(*operands):
            results = both(*operands)
            if results is not None:
                done.append(1)
            return results

        return counted

    for op in (linear_op, conv2d_op):
        both, kernels = op._gradients["cpu"]
        monkeypatch.setitem(op._gradients, "cpu", (counting(both), kernels))
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


@pytest.mark.parametrize("op", [linear_op, linear_dgrad_op, linear_wgrad_op], ids=lambda op: op.reference.__name__)
def test_another_kernel_for_a_while(op, calls, random_mask):
    *_, loss = layer(random_mask((5, 6), 0.5))
    with op.computed_by("cpu", op.reference):
        loss().backward()
    assert calls == []
    loss().backward()
    assert calls == [1]


def measured(random_mask, kernel, passes=200):
    mask = random_mask((600, 500, *kernel), 0.02)
    x, weight = (torch.randn(*shape, *kernel, requires_grad=True) for shape in ((2, 500), (600, 500)))
    op = granet_kernels.conv2d if kernel else granet_kernels.linear
    plan.clear()
    with plan.use("measured"):
        for _ in range(passes):
            op(x, weight, mask).sum().backward()
    assert plan.summary().calls == 3 * passes


def test_a_measured_plan_goes_on_measuring_convolutions(calls, random_mask, monkeypatch):
    """Every sixteenth pass is for the ops, which are timed; the others count."""
    record, timed = plan.record, []

    def record_clearly(site, layout, implementation, seconds, warm):
        timed.append(len(calls))
        record(site, layout, implementation, 1e-3 if implementation == plan.NATIVE else 1.0, warm)

    monkeypatch.setattr(plan, "record", record_clearly)
    measured(random_mask, (2, 2))
    assert 150 < len(calls) <= 200 - 200 // 16
    assert timed[-1] > 150


def test_a_measured_plan_times_both_gradients_of_a_linear_layer_as_one(calls, random_mask, monkeypatch):
    """Once it knows the dense times; what the two calls would take alone is not asked again."""
    record, together, alone, both = plan.record, plan.record_together, [], []

    def record_clearly(site, layout, implementation, seconds, warm):
        alone.append((len(calls), site.key.split()[1]))
        record(site, layout, implementation, 1e-3 if implementation == plan.NATIVE else 1.0, warm)

    def record_together_clearly(sites, layout, seconds, warm):
        both.append(len(calls))
        together(sites, layout, 1e-3, warm)

    monkeypatch.setattr(plan, "record", record_clearly)
    monkeypatch.setattr(plan, "record_together", record_together_clearly)
    measured(random_mask, ())
    assert len(calls) >= 190
    assert {direction for number, direction in alone if number > 2} == {"forward"}
    assert len(both) >= 10
    assert both[-1] > 180


def test_what_the_library_does_not_support_is_for_the_ops(monkeypatch, random_mask):
    class Refusing:
        granet_conv2d_backward = staticmethod(lambda *arguments: 2)

        def __getattr__(self, name):
            return getattr(real, name)

    real, mask = library.load(), random_mask((5, 6), 0.5)
    monkeypatch.setattr(library, "load", Refusing)
    with torch.no_grad():
        assert linear_op.gradients(torch.randn(9, 5), torch.randn(9, 6), torch.randn(5, 6), mask, None) is None
