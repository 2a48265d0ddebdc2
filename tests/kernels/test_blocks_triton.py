"""The block-sparse linear kernels in Triton against torch in float64: on a CUDA device, or interpreted in CPU memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from granet_kernels.reference import linear_dgrad_ref, linear_ref, linear_wgrad_ref

pytest.importorskip("triton")

import triton.language as tl

from granet_kernels.triton_backend.block_index import SIZES, block_index
from granet_kernels.triton_backend.block_linear import block_linear, block_linear_dgrad, block_linear_wgrad

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda" if torch.cuda.is_available() else "interpreted"])
def device(request):
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def _dots_of_bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 in uint16, and tl.dot multiplies those integers: give it the numbers."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def numbers(handle):
        if handle.data.dtype != np.uint16 or handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, numbers(a), numbers(b), *rest)
    )


def block_mask(rows, columns, size, density):
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[torch.randperm(rows * columns)[: round(density * rows * columns)]] = True
    return kept.view(rows, columns).repeat_interleave(size, 0).repeat_interleave(size, 1)


def check(device, accurate, n, mask, dtype, bias=True, strided=False):
    outputs, inputs = mask.shape
    x, grad = torch.randn(n, inputs), torch.randn(n, outputs)
    if strided:
        x, grad = torch.randn(n, inputs + 3)[:, 3:], torch.randn(outputs, n).t()
    weight, b = torch.randn(mask.shape), torch.randn(outputs) if bias else None
    x, grad, weight, b = (None if t is None else t.to(dtype) for t in (x, grad, weight, b))
    on = [None if t is None else t.to(device) for t in (x, grad, weight, b, mask)]
    index = block_index(on[4])
    wide = [None if t is None else t.double() for t in (x, grad, weight, b)]
    y = block_linear(on[0], on[2], index, on[3])
    accurate(y.cpu(), linear_ref(x, weight, mask, b), linear_ref(wide[0], wide[2], mask, wide[3]))
    x_grad = block_linear_dgrad(on[1], on[2], index)
    accurate(x_grad.cpu(), linear_dgrad_ref(grad, weight, mask), linear_dgrad_ref(wide[1], wide[2], mask))
    w_grad = block_linear_wgrad(on[1], on[0], on[4], index)
    accurate(w_grad.cpu(), linear_wgrad_ref(grad, x, mask), linear_wgrad_ref(wide[1], wide[0], mask))
    assert not w_grad.cpu()[~mask].any()
    assert w_grad.stride() == on[4].stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_as_accurate_as_torch(size, dtype, device, assert_as_accurate):
    check(device, assert_as_accurate, 100, block_mask(3, 2, size, 0.5), dtype)


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("n", [0, 1, 7, 63, 129, 300])
def test_any_number_of_rows(n, density, device, assert_as_accurate):
    check(device, assert_as_accurate, n, block_mask(5, 7, 16, density), torch.float32, bias=n % 2 == 0)


def test_strided_operands(device, assert_as_accurate):
    check(device, assert_as_accurate, 70, block_mask(2, 3, 32, 0.5), torch.float32, strided=True)
    check(device, assert_as_accurate, 70, block_mask(2, 3, 32, 0.5).t().contiguous().t(), torch.float32)


def test_the_largest_blocks_are_found():
    for size in SIZES:
        mask = block_mask(4, 4, size, 0.3)
        index = block_index(mask)
        assert index.size == size
        for lines, of_mask in ((index.rows, mask), (index.columns, mask.t())):
            assert sorted(lines.order.tolist()) == list(range(4))
            assert lines.counts.sum() == index.kept == round(0.3 * 16)
            for line, count, blocks in zip(*map(Tensor.tolist, (lines.order, lines.counts, lines.blocks)), strict=True):
                assert blocks[:count] == of_mask[line * size, ::size].nonzero().flatten().tolist()
                assert sorted(blocks) == list(range(4))
            assert lines.counts.tolist() == sorted(lines.counts.tolist(), reverse=True)
    assert block_index(torch.ones(256, 256, dtype=torch.bool)).size == 128
    assert block_index(torch.rand(64, 64) < 0.5) is None
    assert block_index(torch.ones(24, 16, dtype=torch.bool)) is None
    assert block_index(torch.ones(0, 16, dtype=torch.bool)) is None


def test_the_index_follows_the_mask():
    mask = block_mask(2, 2, 16, 0.5)
    index = block_index(mask)
    assert block_index(mask) is index
    mask.fill_(True)
    assert block_index(mask).size == 32
    mask[0, 0] = False
    assert block_index(mask) is None
