"""Masks of blocks, whose rows share their kept positions, run on kernels of their own: the same results."""

from __future__ import annotations

import pytest
import torch

from granet_kernels import plan
from granet_kernels.cpu_backend import library

OPS = torch.ops.granet
pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="no native library")

ISAS = ["portable", "avx2", "avx512"]
BLOCKS = [(4, 4), (16, 8), (4, 1), (1, 4), (2, 2)]
# name: (x shape, weight shape, stride, padding); a linear layer where the shapes have two dimensions
SHAPES = {
    "linear": ((33, 64), (48, 64)),
    "linear-wide": ((70, 1200), (16, 1200)),
    "linear-one-image": ((1, 32), (16, 32)),
    "1x1": ((5, 16, 7, 5), (32, 16, 1, 1), (1, 1), (0, 0)),
    "1x1-in-place": ((3, 32, 8, 16), (16, 32, 1, 1), (1, 1), (0, 0)),
    "1x1-stride": ((17, 16, 9, 6), (16, 16, 1, 1), (2, 2), (0, 0)),
    "1x1-padded": ((2, 16, 4, 4), (16, 16, 1, 1), (1, 1), (1, 2)),
    "3x3": ((3, 16, 8, 8), (16, 16, 3, 3), (1, 1), (1, 1)),
}


@pytest.fixture(autouse=True)
def _native_and_nan_in_new_memory():
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    with plan.use("native"):
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def block_mask(shape, block, density=0.4):
    """Whole blocks of the weight as a matrix."""
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    kept = torch.rand(-(-rows // block[0]), -(-columns // block[1])) < density
    return kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns].reshape(shape)


def results(x, weight, mask, bias, grad, geometry, dtype=torch.float32):
    x, weight, bias, grad = (t.to(dtype) for t in (x, weight, bias, grad))
    if x.dim() == 2:
        return (
            OPS.linear(x, weight, mask, bias, None),
            OPS.linear_dgrad(grad, weight, mask, None),
            OPS.linear_wgrad(grad, x, mask, None),
        )
    numbers = (*geometry, (1, 1), 1)
    return (
        OPS.conv2d(x, weight, mask, bias, *numbers, None),
        OPS.conv2d_dgrad(grad, weight, mask, x.shape, *numbers, None),
        OPS.conv2d_wgrad(grad, x, mask, *numbers, None),
    )


def operands(name, block, layout=torch.contiguous_format):
    x_shape, w_shape, *geometry = SHAPES[name]
    mask, bias = block_mask(w_shape, block), torch.randn(w_shape[0])
    x, weight, grad = (torch.randn(shape) for shape in (x_shape, w_shape, _output_shape(x_shape, w_shape, geometry)))
    if x.dim() == 4:
        x, weight, mask, grad = (t.contiguous(memory_format=layout) for t in (x, weight, mask, grad))
    return x, weight, mask, bias, grad, geometry


def _output_shape(x_shape, w_shape, geometry):
    if not geometry:
        return (x_shape[0], w_shape[0])
    stride, padding = geometry
    size = [(x_shape[2 + i] + 2 * padding[i] - w_shape[2 + i]) // stride[i] + 1 for i in (0, 1)]
    return (x_shape[0], w_shape[0], *size)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_torch_with_any_number_of_threads(name, block, isa, assert_as_accurate, isa_used):
    given = operands(name, block)
    with plan.use("dense"):
        torchs = results(*given)
        exact = results(*given, dtype=torch.float64)
    with isa_used(isa):
        seen = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            seen.append(results(*given))
    for actual, own, expected in zip(seen[0], torchs, exact, strict=True):
        assert_as_accurate(actual, own, expected)
    assert seen[0][2][~given[2]].count_nonzero() == 0
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("name", ["1x1", "1x1-in-place", "1x1-stride"])
def test_channels_last(name, assert_as_accurate):
    given = operands(name, (4, 4), torch.channels_last)
    with plan.use("dense"):
        torchs = results(*given)
        exact = results(*given, dtype=torch.float64)
    for actual, own, expected in zip(results(*given), torchs, exact, strict=True):
        assert_as_accurate(actual, own, expected)


@pytest.mark.parametrize("name", ["linear", "1x1-in-place"])
def test_almost_blocks(name, assert_as_accurate):
    """One position more, or moved to a neighbour, and the rows share nothing any more."""
    given = operands(name, (4, 4))
    mask = given[2]
    flat = mask.view(-1)
    kept, dropped = flat.nonzero()[5].item(), (~flat).nonzero()[7].item()
    for change in ([dropped], [kept], [kept, dropped]):
        flat[change] = ~flat[change]
        with plan.use("dense"):
            torchs = results(*given)
            exact = results(*given, dtype=torch.float64)
        for actual, own, expected in zip(results(*given), torchs, exact, strict=True):
            assert_as_accurate(actual, own, expected)
