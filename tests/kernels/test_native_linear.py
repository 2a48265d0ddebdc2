"""Gradients of linear layers on one walk over the weight: panels of every width, long rows, odd layouts."""

from __future__ import annotations

import pytest
import torch
from cases import ISAS, sliced, transposed

from granet_kernels.conv2d import conv2d_op
from granet_kernels.cpu_backend import library
from granet_kernels.cpu_backend.calls import find_call
from granet_kernels.layout import layout_of
from granet_kernels.linear import linear_op

OPS = torch.ops.granet
pytestmark = [
    pytest.mark.skipif(library.unavailable() is not None, reason="no native library"),
    pytest.mark.usefixtures("natively_with_nan_in_new_memory"),
]

# Images whose panels have from 1 to 8 vectors, of 16, 8 or 4 images; the last panel is not full, or hardly begun.
IMAGES = [3, 7, 10, 20, 30, 40, 60, 635, 650, 765, 890, 1020]


def given(random_mask, images, inputs, outputs, sparsity):
    x, grad = torch.randn(images, inputs), torch.randn(images, outputs)
    return grad, x, torch.randn(outputs, inputs), random_mask((outputs, inputs), 1 - sparsity)


def both(grad, x, weight, mask):
    with torch.no_grad():
        return linear_op.gradients(grad, x, weight, mask, None)


def alone(grad, x, weight, mask):
    return OPS.linear_dgrad(grad, weight, mask, None), OPS.linear_wgrad(grad, x, mask, None)


def torchs(grad, x, weight, mask, dtype):
    grad, x, weight = (t.to(dtype) for t in (grad, x, weight * mask))
    return grad @ weight, grad.t() @ x * mask


def assert_right(operands, assert_as_accurate):
    x_grad, w_grad = results = both(*operands)
    expected = (torchs(*operands, dtype) for dtype in (torch.float32, torch.float64))
    for actual, own, exact in zip(results, *expected, strict=True):
        assert_as_accurate(actual, own, exact)
    assert w_grad[~operands[3]].count_nonzero() == 0
    for one, other in zip(results, alone(*operands), strict=True):
        assert torch.equal(one, other)
    return x_grad, w_grad


def is_one_walk(grad, x, weight, mask):
    dgrad = find_call("linear", "dgrad", grad, weight, mask)
    wgrad = find_call("linear", "wgrad", grad, x, mask)
    operands = layout_of(mask).native, dgrad.conv, dgrad.first, wgrad.second, dgrad.second, dgrad.threads
    return library.load().granet_conv2d_reads_once(*operands) == 2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sparsity", [0.6, 0.97])
@pytest.mark.parametrize("images", IMAGES)
def test_panels_of_every_width(images, sparsity, isa, isa_used, random_mask, assert_as_accurate):
    operands = given(random_mask, images, 61, 45, sparsity)
    with isa_used(isa):
        seen = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            seen.append(assert_right(operands, assert_as_accurate))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("outputs", [255, 256, 257, 1500])
def test_sums_of_many_weights(outputs, isa, isa_used, random_mask, assert_as_accurate):
    """An input with more weights than are added in one sum."""
    with isa_used(isa):
        assert_right(given(random_mask, 33, 5, outputs, 0), assert_as_accurate)


@pytest.mark.parametrize("lay", [sliced, transposed])
@pytest.mark.parametrize("images", [40, 600])
def test_strided_operands(images, lay, random_mask, assert_as_accurate):
    grad, x, weight, mask = given(random_mask, images, 50, 70, 0.8)
    assert_right((lay(grad), lay(x), weight, mask), assert_as_accurate)
    by_column = weight.t().contiguous().t(), mask.t().contiguous().t()
    assert_right((grad, x, *by_column), assert_as_accurate)


def test_uneven_rows_and_columns(random_mask, assert_as_accurate):
    grad, x, weight, mask = given(random_mask, 200, 90, 80, 0.7)
    mask[::3], mask[:, 40:70], mask[:, 7] = False, False, True
    assert_right((grad, x, weight, mask), assert_as_accurate)
    mask.fill_(False)
    mask[11, 13] = True
    x_grad, w_grad = assert_right((grad, x, weight, mask.clone()), assert_as_accurate)
    assert x_grad.count_nonzero(0).nonzero().tolist() == [[13]]
    assert w_grad.nonzero().tolist() == [[11, 13]]


def test_nan_and_inf_stay_with_what_they_meet(random_mask):
    grad, x, weight, mask = given(random_mask, 100, 40, 30, 0.8)
    grad[17, 3], x[50, 8] = torch.nan, torch.inf
    x_grad, w_grad = both(grad, x, weight, mask)
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[17] = mask[3]
    assert torch.equal(~x_grad.isfinite(), expected)
    expected = torch.zeros_like(mask)
    expected[3] = expected[:, 8] = True
    assert torch.equal(~w_grad.isfinite(), expected & mask)


def test_one_walk_serves_both(random_mask):
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert is_one_walk(*given(random_mask, 200, 64, 48, 0.9))


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_more_outputs_than_the_cache_holds(isa, isa_used, random_mask, assert_as_accurate):
    """A panel takes more than a second-level cache, of 14 MB even: both gradients go their own ways."""
    operands = given(random_mask, 200, 3, 70_000, 0.9)
    torch.set_num_threads(3)
    with isa_used(isa):
        assert not is_one_walk(*operands)
        assert_right(operands, assert_as_accurate)


@pytest.mark.parametrize(("pad", "stride"), [(1, 3), (2, 5), (0, 2)])
def test_padding_alone_is_no_linear_layer(pad, stride, random_mask):
    """One pixel in and one out, but with padding that one reads nothing but zeros."""
    grad, x, weight, mask = given(random_mask, 20, 30, 25, 0.5)
    rest = [stride, stride], [pad, pad], [1, 1], 1, None
    grad, x, weight, mask = (t[..., None, None] for t in (grad, x, weight, mask))
    x_grad = OPS.conv2d_dgrad(grad, weight, mask, x.shape, *rest)
    w_grad = OPS.conv2d_wgrad(grad, x, mask, *rest)
    if pad:
        assert x_grad.count_nonzero() == w_grad.count_nonzero() == 0
    else:
        expected = torchs(*(t[..., 0, 0] for t in (grad, x, weight, mask)), torch.float32)
        torch.testing.assert_close((x_grad[..., 0, 0], w_grad[..., 0, 0]), expected)
    with torch.no_grad():
        for one, other in zip(conv2d_op.gradients(grad, x, weight, mask, *rest), (x_grad, w_grad), strict=True):
            assert torch.equal(one, other)
