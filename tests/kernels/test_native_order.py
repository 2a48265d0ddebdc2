"""Rows of few weights, which are taken by length within a group: the same bits wherever a row lies."""

from __future__ import annotations

import pytest
import torch
from cases import ISAS

from granet_kernels import plan
from granet_kernels.cpu_backend import library
from granet_kernels.layout import layout_of
from granet_kernels.linear import linear_op

OPS = torch.ops.granet
pytestmark = [
    pytest.mark.skipif(library.unavailable() is not None, reason="no native library"),
    pytest.mark.usefixtures("natively_with_nan_in_new_memory"),
]

# Several blocks of short rows, whatever the sizes of the CPU's caches.
IMAGES, INPUTS, OUTPUTS = 128, 900, 235
# name: (x shape, weight shape, stride, padding, the mean share of weights that is kept).
CONVS = {
    "in place": ((2, 450, 8, 8), (100, 450, 1, 1), 1, 0, 0.112),
    "stride": ((3, 300, 8, 8), (100, 300, 1, 1), 2, 0, 0.22),
    "phases of the input gradient": ((3, 20, 8, 8), (150, 20, 3, 3), 2, 1, 0.15),
}


def uneven_mask(rows, columns, share=0.22):
    """A share of all is kept, of each row and column between nothing and about two and a half times that."""
    shares = (torch.rand(rows, 1) + torch.rand(1, columns)) ** 2 * share
    shares[:: rows // 7] = shares[:, :: columns // 5] = 0
    return torch.rand(rows, columns) < shares


def of_linear():
    mask = uneven_mask(OUTPUTS, INPUTS, share=0.09)
    x, grad = torch.randn(IMAGES, INPUTS), torch.randn(IMAGES, OUTPUTS)
    return x, grad, torch.randn(mask.shape), mask, torch.randn(OUTPUTS)


def linear(x, grad, weight, mask, bias):
    return (
        OPS.linear(x, weight, mask, bias, None),
        OPS.linear_dgrad(grad, weight, mask, None),
        OPS.linear_wgrad(grad, x, mask, None),
    )


@pytest.mark.parametrize("isa", ISAS)
def test_linear(isa, isa_used, assert_as_accurate):
    x, grad, weight, mask, bias = given = of_linear()
    with plan.use("dense"):
        torchs = linear(*given)
        exact = linear(x.double(), grad.double(), weight.double(), mask, bias.double())
    p, q = torch.randperm(OUTPUTS), torch.randperm(INPUTS)
    with isa_used(isa):
        results = linear(*given)
        y = OPS.linear(x, weight[p], mask[p], bias[p], None)
        x_grad = OPS.linear_dgrad(grad, weight[:, q], mask[:, q], None)
        w_grad = OPS.linear_wgrad(grad[:, p], x, mask[p], None)
        with torch.no_grad():
            both = linear_op.gradients(grad, x, weight, mask, None)
    for actual, own, expected in zip(results, torchs, exact, strict=True):
        assert_as_accurate(actual, own, expected)
    assert results[2][~mask].count_nonzero() == 0
    assert torch.equal(y, results[0][:, p])
    assert torch.equal(x_grad, results[1][:, q])
    assert torch.equal(w_grad, results[2][p])
    assert torch.equal(both[0], results[1])
    assert torch.equal(both[1], results[2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("images", [3, IMAGES])
def test_parts_of_the_rows(images, isa, isa_used):
    """With more threads than panels the rows are split, where groups may be cut: then they have no order."""
    x, grad, *weights = of_linear()
    seen = []
    with isa_used(isa):
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            seen.append(linear(x[:images], grad[:images], *weights))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def of_conv2d(name):
    x_shape, w_shape, stride, padding, share = CONVS[name]
    rows = w_shape[0]
    x, weight = torch.randn(x_shape), torch.randn(w_shape)
    mask = uneven_mask(rows, weight[0].numel(), share)
    geometry = (stride, stride), (padding, padding), (1, 1), 1
    return x, torch.randn(x_shape[0], rows, 8 // stride, 8 // stride), weight, mask.view(w_shape), geometry


def conv2d(x, grad, weight, mask, geometry):
    return (
        OPS.conv2d(x, weight, mask, None, *geometry, None),
        OPS.conv2d_dgrad(grad, weight, mask, x.shape, *geometry, None),
        OPS.conv2d_wgrad(grad, x, mask, *geometry, None),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CONVS)
def test_conv2d(name, isa, isa_used, assert_as_accurate):
    x, grad, weight, mask, geometry = given = of_conv2d(name)
    with plan.use("dense"):
        torchs = conv2d(*given)
        exact = conv2d(x.double(), grad.double(), weight.double(), mask, geometry)
    with isa_used(isa):
        results = conv2d(*given)
    for actual, own, expected in zip(results, torchs, exact, strict=True):
        assert_as_accurate(actual, own, expected)
    assert results[2][~mask].count_nonzero() == 0


def bytes_of_rows(mask):
    """Of the tables made from the mask, if it is a single one, without its entries and the end of the last row."""
    layout = layout_of(mask)
    of_mask = 4 * (mask.shape[0] + 1 + layout.nnz)
    return library.load().granet_layout_bytes(layout.native) - of_mask - 4 * (2 * layout.nnz + 1)


def assert_has_order(mask, rows):
    """A table has four bytes for each row of a block, and five with an order."""
    blocks, rest = divmod(bytes_of_rows(mask), 5 * rows)
    assert rest == 0
    assert blocks >= 2
    assert blocks % 4 != 0  # four or five bytes: then it could be either


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_the_rows_of_linear_layers_have_an_order(isa, isa_used):
    """Else the tests above test nothing."""
    x, _, weight, mask, _ = of_linear()
    with isa_used(isa):
        OPS.linear(x, weight, mask, None, None)
    assert_has_order(mask, OUTPUTS)


@pytest.mark.parametrize("isa", ISAS)
def test_the_rows_of_convolutions_have_an_order(isa, isa_used):
    in_place, phases = of_conv2d("in place"), of_conv2d("phases of the input gradient")
    with isa_used(isa):
        x, _, weight, mask, geometry = in_place
        OPS.conv2d(x, weight, mask, None, *geometry, None)
        assert_has_order(mask, 100)
        x, grad, weight, mask, geometry = phases
        OPS.conv2d_dgrad(grad, weight, mask, x.shape, *geometry, None)
        assert_has_order(mask, 4 * 20)
