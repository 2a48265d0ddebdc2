"""Rows of few weights, which are taken by length within a group: the same bits wherever a row lies."""

from __future__ import annotations

import pytest
import torch
from cases import ISAS
from torch.nn.grad import conv2d_weight

from granet_kernels import plan
from granet_kernels.cpu_backend import library
from granet_kernels.layout import layout_of

OPS = torch.ops.granet
pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="no native library")


@pytest.fixture(autouse=True)
def _native():
    threads = torch.get_num_threads()
    with plan.use("native"):
        yield
    torch.set_num_threads(threads)


def uneven_mask(rows, columns):
    """About a fifth is kept, of each row and column between nothing and half."""
    share = (torch.rand(rows, 1) + torch.rand(1, columns)) ** 2 / 5
    share[:: rows // 7] = share[:, :: columns // 5] = 0
    return torch.rand(rows, columns) < share


def linear(x, grad, weight, mask, bias):
    return (
        OPS.linear(x, weight, mask, bias, None),
        OPS.linear_dgrad(grad, weight, mask, None),
        OPS.linear_wgrad(grad, x, mask, None),
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(128, 333, 315), (64, 500, 64), (600, 257, 256)], ids=str)
def test_linear(sizes, threads, isa, isa_used, assert_as_accurate):
    torch.set_num_threads(threads)
    images, inputs, outputs = sizes
    mask, bias = uneven_mask(outputs, inputs), torch.randn(outputs)
    x, grad, weight = torch.randn(images, inputs), torch.randn(images, outputs), torch.randn(outputs, inputs)
    with isa_used(isa):
        results = linear(x, grad, weight, mask, bias)
        p, q = torch.randperm(outputs), torch.randperm(inputs)
        y = OPS.linear(x, weight[p], mask[p], bias[p], None)
        x_grad = OPS.linear_dgrad(grad, weight[:, q], mask[:, q], None)
        w_grad = OPS.linear_wgrad(grad[:, p], x, mask[p], None)
    with plan.use("dense"):
        torchs = linear(x, grad, weight, mask, bias)
        exact = linear(x.double(), grad.double(), weight.double(), mask, bias.double())
    for actual, own, expected in zip(results, torchs, exact, strict=True):
        assert_as_accurate(actual, own, expected)
    assert torch.equal(y, results[0][:, p])
    assert torch.equal(x_grad, results[1][:, q])
    assert torch.equal(w_grad, results[2][p])
    assert results[2][~mask].count_nonzero() == 0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_conv2d(isa, stride, isa_used, assert_as_accurate):
    """In place (stride 1), and by panels, where the pixels of an input gradient lie in phases (stride 2)."""
    geometry = (stride, stride), (0, 0), (1, 1), 1
    mask = uneven_mask(100, 300)[:, :, None, None]
    x, weight = torch.randn(3, 300, 8, 8), torch.randn(mask.shape)
    grad = torch.randn(3, 100, 8 // stride, 8 // stride)
    with isa_used(isa):
        y = OPS.conv2d(x, weight, mask, None, *geometry, None)
        x_grad = OPS.conv2d_dgrad(grad, weight, mask, x.shape, *geometry, None)
        w_grad = OPS.conv2d_wgrad(grad, x, mask, *geometry, None)

    def torchs(dtype):
        a, w, g = x.to(dtype).requires_grad_(), (weight * mask).to(dtype), grad.to(dtype)
        out = torch.nn.functional.conv2d(a, w, None, stride)
        (a_grad,) = torch.autograd.grad(out, a, g)
        return out.detach(), a_grad, conv2d_weight(a.detach(), w.shape, g, stride) * mask

    for actual, own, exact in zip((y, x_grad, w_grad), torchs(torch.float32), torchs(torch.float64), strict=True):
        assert_as_accurate(actual, own, exact)
    assert w_grad[~mask].count_nonzero() == 0


def test_short_rows_have_an_order(isa_used):
    """Else the tests above test nothing: a table with an order has five bytes for each row of a block, not four."""
    outputs, inputs = 315, 333
    mask = uneven_mask(outputs, inputs)
    layout = layout_of(mask)
    with isa_used("avx512"):
        OPS.linear(torch.randn(128, inputs), torch.randn(outputs, inputs), mask, None, None)
    of_mask, of_table = 4 * (outputs + 1 + layout.nnz), 4 * (2 * layout.nnz + 1)
    of_rows = library.load().granet_layout_bytes(layout.native) - of_mask - of_table
    blocks, rest = divmod(of_rows, 5 * outputs)
    assert rest == 0
    assert 2 <= blocks <= 4
