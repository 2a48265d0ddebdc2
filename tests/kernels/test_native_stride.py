"""1 x 1 convolutions with a stride, natively: the pixels that count are copied into a row, or spread from one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import ISAS, as_double, expanded, in_channels_last, part_of_the_channels
from torch.nn.grad import conv2d_weight

from granet_kernels.conv2d import conv2d_op
from granet_kernels.cpu_backend import library

OPS = torch.ops.granet
pytestmark = [
    pytest.mark.skipif(library.unavailable() is not None, reason="no native library"),
    pytest.mark.usefixtures("natively_with_nan_in_new_memory"),
]

# x shape, outputs, stride; the output has as many pixels as fill vectors, but in the last two.
SIZES = [
    ((3, 20, 16, 16), 24, (2, 2)),
    ((2, 33, 23, 15), 7, (3, 2)),
    ((5, 7, 8, 31), 40, (1, 2)),
    ((1, 63, 15, 8), 16, (2, 1)),
    ((6, 3, 56, 56), 20, (2, 2)),
    ((7, 20, 8, 8), 24, (2, 2)),
    ((2, 100, 16, 16), 300, (2, 2)),
    ((3, 20, 14, 14), 24, (2, 2)),
    ((2, 5, 9, 300), 4, (2, 300)),
]


def operands(mask, x_shape, stride):
    size = [(x_shape[2 + i] - 1) // stride[i] + 1 for i in (0, 1)]
    weight, bias = torch.randn(mask.shape), torch.randn(mask.shape[0])
    return torch.randn(x_shape), torch.randn(x_shape[0], mask.shape[0], *size), weight, mask, bias


def results(x, grad, weight, mask, bias, stride):
    geometry = stride, (0, 0), (1, 1), 1
    return (
        OPS.conv2d(x, weight, mask, bias, *geometry, None),
        OPS.conv2d_dgrad(grad, weight, mask, x.shape, *geometry, None),
        OPS.conv2d_wgrad(grad, x, mask, *geometry, None),
    )


def torchs(x, grad, weight, mask, bias, stride):
    x, weight = x.detach().requires_grad_(), weight * mask
    y = F.conv2d(x, weight, bias, stride)
    (x_grad,) = torch.autograd.grad(y, x, grad)
    return y.detach(), x_grad, conv2d_weight(x.detach(), weight.shape, grad, stride) * mask


def assert_right(given, stride, assert_as_accurate):
    got = results(*given, stride)
    for actual, own, exact in zip(got, torchs(*given, stride), torchs(*as_double(given), stride), strict=True):
        assert_as_accurate(actual, own, exact)
    x_grad, mask = got[1].clone(), given[3]
    x_grad[:, :, :: stride[0], :: stride[1]] = 0
    assert x_grad.count_nonzero() == 0
    assert got[2][~mask].count_nonzero() == 0
    return got


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
@pytest.mark.parametrize(("x_shape", "outputs", "stride"), SIZES, ids=str)
def test_as_accurate_as_torch(x_shape, outputs, stride, density, isa, random_mask, isa_used, assert_as_accurate):
    mask = random_mask((outputs, x_shape[1], 1, 1), density)
    with isa_used(isa):
        assert_right(operands(mask, x_shape, stride), stride, assert_as_accurate)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("side", [16, 56])
@pytest.mark.parametrize("height", [1, 4])
def test_any_number_of_threads_and_one_call(height, side, isa, random_mask, isa_used):
    mask = random_mask((40 // height, 7), 0.3).repeat_interleave(height, 0).repeat_interleave(height, 1)
    x, grad, weight, mask, _ = given = operands(mask[:, :, None, None], (5, mask.shape[1], side, side), (2, 2))
    with isa_used(isa):
        seen = []
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            with torch.no_grad():
                both = conv2d_op.gradients(grad, x, weight, mask, (2, 2), (0, 0), (1, 1), 1, None)
            seen.append([*results(*given, (2, 2)), *both])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    assert torch.equal(seen[0][1], seen[0][3])
    assert torch.equal(seen[0][2], seen[0][4])


@pytest.mark.parametrize("of_grad", [torch.clone, part_of_the_channels, in_channels_last, expanded])
@pytest.mark.parametrize("of_x", [torch.clone, part_of_the_channels, in_channels_last, expanded])
def test_any_strides(of_x, of_grad, random_mask, assert_as_accurate):
    x, grad, *others = operands(random_mask((24, 20, 1, 1), 0.3), (3, 20, 16, 16), (2, 2))
    assert_right((of_x(x), of_grad(grad), *others), (2, 2), assert_as_accurate)


def test_pixels_that_are_left_out_may_be_anything(random_mask):
    x, grad, *others = operands(random_mask((24, 20, 1, 1), 0.3), (3, 20, 16, 16), (2, 2))
    expected = results(x, grad, *others, (2, 2))
    filled = torch.full_like(x, torch.nan)
    filled[:, :, ::2, ::2] = x[:, :, ::2, ::2]
    assert all(map(torch.equal, results(filled, grad, *others, (2, 2)), expected))
