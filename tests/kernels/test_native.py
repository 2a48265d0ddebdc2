"""The native CPU kernels against the reference in float64: every op, direction, instruction set and number of threads.

New memory holds NaN here, so an output that is not written everywhere fails.
"""

from __future__ import annotations

import itertools
from functools import partial

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import (
    GEOMETRIES,
    ISAS,
    LAYOUTS,
    LINEAR,
    PRODUCT,
    SIDES,
    SPARSITIES,
    linear_operands,
    sliced,
    transposed,
)
from torch.nn.grad import conv2d_input, conv2d_weight

from granet_kernels import plan
from granet_kernels.cpu_backend import library

OPS = torch.ops.granet
pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="no native library")


@pytest.fixture(autouse=True)
def _native_and_nan_in_new_memory():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    with plan.use("native"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def conv_operands(random_mask):
    return partial(cases.conv_operands, random_mask)


def conv_results(x, grad, weight, mask, bias, rest):
    """y, x gradient, weight gradient of the ops."""
    rest = [*map(list, rest), 1]
    return (
        OPS.conv2d(x, weight, mask, bias, *rest, None),
        OPS.conv2d_dgrad(grad, weight, mask, x.shape, *rest, None),
        OPS.conv2d_wgrad(grad, x, mask, *rest, None),
    )


def torch_conv_results(x, grad, weight, mask, bias, rest, dtype):
    x, grad, weight, bias = (t.to(dtype) for t in (x, grad, weight * mask, bias))
    return (
        F.conv2d(x, weight, bias, *rest),
        conv2d_input(x.shape, weight, grad, *rest),
        conv2d_weight(x, weight.shape, grad, *rest) * mask,
    )


def assert_conv_as_accurate(actual, operands, assert_as_accurate):
    """Twice torch's own error in the layout where that is larger: channels_last adds up in sequence, as we do."""
    *tensors, rest = operands
    last = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    exact = torch_conv_results(*operands, torch.float64)
    torchs = [torch_conv_results(*each, rest, torch.float32) for each in (tensors, last)]
    for own, first, second, true in zip(actual, *torchs, exact, strict=True):
        worse = max(first, second, key=lambda result: float((result.double() - true).abs().max()))
        assert_as_accurate(own, worse, true)


def assert_ran_natively(mask):
    assert {name for name, _ in plan.report(mask).values()} == {"native"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv2d_is_as_accurate_as_torch(name, sparsity, layout, conv_operands, assert_as_accurate):
    operands = conv_operands(name, sparsity, layout)
    actual = conv_results(*operands)
    assert_conv_as_accurate(actual, operands, assert_as_accurate)
    assert actual[2][~operands[3]].count_nonzero() == 0
    assert_ran_natively(operands[3])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sparsity", [0, 0.9])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv2d_on_every_instruction_set(name, sparsity, isa, conv_operands, assert_as_accurate, isa_used):
    operands = conv_operands(name, sparsity)
    with isa_used(isa):
        actual = conv_results(*operands)
    assert_conv_as_accurate(actual, operands, assert_as_accurate)


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_conv2d_has_the_same_bits_with_any_number_of_threads(name, isa, layout, conv_operands, isa_used):
    operands = conv_operands(name, 0.5, layout)
    with isa_used(isa):
        one = conv_results(*operands)
        for threads in (2, 4):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, one, conv_results(*operands)))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("numbers", list(itertools.product(*PRODUCT.values())), ids=str)
def test_conv2d_of_every_kernel_stride_padding_and_dilation(numbers, layout, conv_operands, assert_as_accurate):
    kernel, *rest = numbers
    for side, sparsity in itertools.product(SIDES, SPARSITIES):
        operands = conv_operands(((17, 5, *side), (6, 5, *kernel), *rest), sparsity, layout)
        torch.set_num_threads(1)
        actual = conv_results(*operands)
        assert_conv_as_accurate(actual, operands, assert_as_accurate)
        assert actual[2][~operands[3]].count_nonzero() == 0
        assert_ran_natively(operands[3])
        for threads in (2, 4):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, actual, conv_results(*operands)))


def linear_results(x, grad, weight, mask, bias):
    return (
        OPS.linear(x, weight, mask, bias, None),
        OPS.linear_dgrad(grad, weight, mask, None),
        OPS.linear_wgrad(grad, x, mask, None),
    )


def torch_linear_results(x, grad, weight, mask, bias, dtype):
    x, grad, weight, bias = (t.to(dtype) for t in (x, grad, weight * mask, bias))
    return F.linear(x, weight, bias), grad @ weight, grad.t() @ x * mask


@pytest.mark.parametrize("lay", [torch.clone, sliced, transposed], ids=["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("sizes", LINEAR.values(), ids=LINEAR)
def test_linear_is_as_accurate_as_torch(sizes, sparsity, lay, random_mask, assert_as_accurate):
    operands = linear_operands(random_mask, sizes, sparsity, lay)
    actual = linear_results(*operands)
    torchs, exact = (torch_linear_results(*operands, dtype) for dtype in (torch.float32, torch.float64))
    for three in zip(actual, torchs, exact, strict=True):
        assert_as_accurate(*three)
    assert actual[2][~operands[3]].count_nonzero() == 0
    assert_ran_natively(operands[3])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sparsity", [0.7, 0.95])  # panels are narrower where rows have few weights
@pytest.mark.parametrize("sizes", LINEAR.values(), ids=LINEAR)
def test_linear_on_every_instruction_set_and_number_of_threads(
    sizes, sparsity, isa, random_mask, assert_as_accurate, isa_used
):
    operands = linear_operands(random_mask, sizes, sparsity)
    torchs, exact = (torch_linear_results(*operands, dtype) for dtype in (torch.float32, torch.float64))
    with isa_used(isa):
        actual = linear_results(*operands)
        for three in zip(actual, torchs, exact, strict=True):
            assert_as_accurate(*three)
        for threads in (2, 4):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, actual, linear_results(*operands)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["3x3-unpadded", "1x1", "1x1-stride", "kernel-as-image"])
def test_what_is_not_finite_passes_as_in_dense(name, value, isa, threads, conv_operands, isa_used):
    """With every position kept, all results show NaN and inf where torch's do.

    Whether a NaN in the weight times the zeros around an image counts is different from place to place in torch.
    """
    torch.set_num_threads(threads)
    x, grad, weight, mask, bias, rest = conv_operands(name, 0)
    for tensor in (x, grad):
        tensor.view(-1)[torch.randint(tensor.numel(), (2,))] = value
    spoiled = weight.clone()
    spoiled[1, 1, 0, 0] = value
    operands = x, grad, weight, mask, bias, rest
    with isa_used(isa):
        actual = *conv_results(*operands), OPS.conv2d(x, spoiled, mask, bias, *map(list, rest), 1, None)
    expected = *torch_conv_results(*operands, torch.float64), F.conv2d(*(t.double() for t in (x, spoiled, bias)), *rest)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, equal_nan=True, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["3x3", "1x1-stride", "uneven"])
def test_nan_reaches_what_kept_positions_touch_and_nothing_else(name, conv_operands):
    x, _, weight, mask, bias, rest = conv_operands(name, 0.8)
    x[:, 1, 1:3, 2] = torch.nan
    y = conv_results(x, torch.ones_like(F.conv2d(x, weight, None, *rest)), weight, mask, bias, rest)[0]
    touched = F.conv2d(x.isnan().double(), mask.double(), None, *rest) > 0
    assert torch.equal(y.isnan(), touched)


def test_a_mask_without_a_kept_position_gives_bias_and_zeros(conv_operands):
    operands = conv_operands("3x3", 1)
    y, x_grad, w_grad = conv_results(*operands)
    assert torch.equal(y, operands[4].reshape(-1, 1, 1).expand_as(y))
    assert x_grad.count_nonzero() == 0
    assert w_grad.count_nonzero() == 0


def test_empty_batches():
    mask = torch.ones(3, 2, 1, 1, dtype=torch.bool)
    x, grad, weight = torch.randn(0, 2, 4, 4), torch.randn(0, 3, 4, 4), torch.randn(3, 2, 1, 1)
    y, x_grad, w_grad = conv_results(x, grad, weight, mask, None, [(1, 1), (0, 0), (1, 1)])
    assert (y.shape, x_grad.shape) == ((0, 3, 4, 4), (0, 2, 4, 4))
    assert w_grad.count_nonzero() == 0
    y, x_grad, w_grad = linear_results(torch.randn(0, 2), torch.randn(0, 3), weight[..., 0, 0], mask[..., 0, 0], None)
    assert (y.shape, x_grad.shape) == ((0, 3), (0, 2))
    assert w_grad.count_nonzero() == 0


def test_a_weight_that_lies_otherwise_than_the_mask(random_mask):
    mask, weight = random_mask((5, 4, 3, 3), 0.5), torch.randn(3, 3, 4, 5).permute(3, 2, 0, 1)
    x, grad, rest = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 4, 4), [(1, 1), (0, 0), (1, 1)]
    operands = x, grad, weight, mask, torch.randn(10)[::2], rest
    for a, e in zip(conv_results(*operands), torch_conv_results(*operands, torch.float64), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-4)
    assert_ran_natively(mask)


def test_a_negated_view_is_read_as_its_values(random_mask):
    x = torch.randn(4, 6, dtype=torch.complex64).conj().imag
    mask, weight = random_mask((3, 6), 0.5), torch.randn(3, 6)
    assert x.is_neg()
    torch.testing.assert_close(OPS.linear(x, weight, mask, None, None), x.resolve_neg() @ (weight * mask).t())


def test_the_dense_gradient_is_dense_at_all_positions(conv_operands):
    x, grad, weight, mask, _, rest = conv_operands("3x3", 0.9)
    w_grad = OPS.conv2d_wgrad(grad, x, mask, *map(list, rest), 1, torch.tensor(True))
    torch.testing.assert_close(w_grad, conv2d_weight(x, weight.shape, grad, *rest))


def test_changed_masks_are_seen(random_mask):
    x, weight, mask = torch.randn(4, 6), torch.randn(5, 6), random_mask((5, 6), 0.5)
    for _ in range(3):
        torch.testing.assert_close(OPS.linear(x, weight, mask, None, None), x @ (weight * mask).t())
        mask.copy_(random_mask((5, 6), 0.3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_computed_densely(dtype, random_mask):
    x, weight, mask = torch.randn(4, 6).to(dtype), torch.randn(5, 6).to(dtype), random_mask((5, 6), 0.5)
    torch.testing.assert_close(OPS.linear(x, weight, mask, None, None), F.linear(x, weight * mask))
    assert plan.report(mask) == {}


@pytest.mark.parametrize("part", ["x", "weight", "mask", "bias", "gradient"])
def test_operands_that_do_not_belong_together_are_refused(part):
    x, grad, weight, bias = torch.randn(2, 3), torch.randn(2, 4), torch.randn(4, 3), torch.randn(4)
    mask = torch.ones(4, 3, dtype=torch.bool)
    calls = {
        "x": lambda: OPS.linear(torch.randn(2, 9), weight, mask, bias, None),
        "weight": lambda: OPS.linear(x, torch.randn(4, 9), mask, bias, None),
        "mask": lambda: OPS.linear(x, weight, torch.ones(9, 3, dtype=torch.bool), bias, None),
        "bias": lambda: OPS.linear(x, weight, mask, torch.randn(9), None),
        "gradient": lambda: OPS.linear_dgrad(grad[:, :2], weight, mask, None),
    }
    with pytest.raises(RuntimeError):
        calls[part]()


def test_what_the_library_does_not_support_is_computed_densely(monkeypatch, random_mask):
    class Refusing:
        granet_conv2d_forward = staticmethod(lambda *arguments: 2)
        granet_layout_new = library.load().granet_layout_new
        granet_layout_free = library.load().granet_layout_free
        granet_is_zero_off = library.load().granet_is_zero_off
        granet_mask_values = library.load().granet_mask_values

    x, weight, mask = torch.randn(11, 6), torch.randn(5, 6), random_mask((5, 6), 0.5)
    expected = F.linear(x, weight * mask)
    monkeypatch.setattr(library, "load", Refusing)
    for _ in range(2):
        torch.testing.assert_close(OPS.linear(x, weight, mask, None, None), expected)
        assert plan.report(mask) == {"forward": ("dense", None)}
