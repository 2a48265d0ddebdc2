"""3 x 3 convolutions with padding 1 to images whose rows fill vectors: each image is copied, not transposed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import ISAS, as_double, expanded, in_channels_last, part_of_the_channels
from torch.nn.grad import conv2d_input, conv2d_weight

from granet_kernels.conv2d import conv2d_op
from granet_kernels.cpu_backend import library

OPS = torch.ops.granet
pytestmark = [
    pytest.mark.skipif(library.unavailable() is not None, reason="no native library"),
    pytest.mark.usefixtures("natively_with_nan_in_new_memory"),
]

# x shape, outputs, stride. With 16 lanes a vector and few kept weights all but the last four go this way.
SIZES = [
    ((3, 7, 16, 16), 33, 1),
    ((2, 63, 32, 16), 5, 1),
    ((4, 20, 8, 32), 24, 1),
    ((5, 1, 24, 32), 1, 1),
    ((2, 3, 4, 64), 17, 1),
    ((2, 5, 12, 64), 7, 1),
    ((3, 7, 32, 32), 33, 2),
    ((2, 20, 16, 64), 3, 2),
    ((2, 3, 8, 128), 5, 2),
    ((1, 100, 16, 16), 300, 1),
    ((2, 7, 15, 16), 9, 1),
    ((2, 7, 31, 32), 9, 2),
    ((2, 7, 32, 31), 9, 2),
    ((2, 7, 16, 48), 9, 1),
]


def operands(mask, x_shape, stride):
    n, _, h, w = x_shape
    grad = torch.randn(n, mask.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1)
    return torch.randn(x_shape), grad, torch.randn(mask.shape), mask, torch.randn(mask.shape[0])


def geometry_of(stride):
    return (stride, stride), (1, 1), (1, 1), 1


def results(x, grad, weight, mask, bias, stride):
    geometry = geometry_of(stride)
    return (
        OPS.conv2d(x, weight, mask, bias, *geometry, None),
        OPS.conv2d_dgrad(grad, weight, mask, x.shape, *geometry, None),
        OPS.conv2d_wgrad(grad, x, mask, *geometry, None),
    )


def torchs(x, grad, weight, mask, bias, stride):
    kept = weight * mask
    return (
        F.conv2d(x, kept, bias, stride, 1),
        conv2d_input(x.shape, kept, grad, stride, 1),
        conv2d_weight(x, weight.shape, grad, stride, 1) * mask,
    )


def assert_right(given, stride, assert_as_accurate):
    """As accurate as torch in the format where it is less so: in channels_last it adds up in sequence, as we do."""
    got, exact = results(*given, stride), torchs(*as_double(given), stride)
    formats = torchs(*given, stride), torchs(*map(in_channels_last, given[:3]), *given[3:], stride)
    for actual, *own, right in zip(got, *formats, exact, strict=True):
        assert_as_accurate(actual, max(own, key=lambda t, right=right: float((t - right).abs().max())), right)
    assert got[2][~given[3]].count_nonzero() == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.3, 1.0])
@pytest.mark.parametrize(("x_shape", "outputs", "stride"), SIZES, ids=str)
def test_as_accurate_as_torch(x_shape, outputs, stride, density, isa, random_mask, isa_used, assert_as_accurate):
    mask = random_mask((outputs, x_shape[1], 3, 3), density)
    with isa_used(isa):
        assert_right(operands(mask, x_shape, stride), stride, assert_as_accurate)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("sizes", "density"), [((40, 24), 0.02), ((40, 24), 0.15), ((100, 300), 0.03)], ids=str)
def test_any_number_of_threads_and_one_call(sizes, density, stride, random_mask):
    mask = random_mask((*sizes, 3, 3), density)
    x, grad, weight, mask, _ = given = operands(mask, (37, sizes[1], 16 * stride, 16 * stride), stride)
    seen = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        with torch.no_grad():
            both = conv2d_op.gradients(grad, x, weight, mask, *geometry_of(stride), None)
        seen.append([*results(*given, stride), *both])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    assert torch.equal(seen[0][1], seen[0][3])
    assert torch.equal(seen[0][2], seen[0][4])


def part_of_the_rows(images):
    n, c, h, w = images.shape
    return torch.full((n, c, h + 3, w), torch.nan)[:, :, 1 : 1 + h].copy_(images)


def part_of_the_columns(images):
    n, c, h, w = images.shape
    return torch.full((n, c, h, w + 3), torch.nan)[..., 1 : 1 + w].copy_(images)


def one_float_further(images):
    return torch.full((images.numel() + 1,), torch.nan)[1:].view(images.shape).copy_(images)


LIE = [
    torch.clone,
    part_of_the_channels,
    part_of_the_rows,
    part_of_the_columns,
    one_float_further,
    in_channels_last,
    expanded,
]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("of_grad", LIE)
@pytest.mark.parametrize("of_x", LIE)
def test_any_strides(of_x, of_grad, stride, random_mask, assert_as_accurate):
    side = 16 * stride
    x, grad, *others = operands(random_mask((24, 20, 3, 3), 0.2), (3, 20, side, side), stride)
    assert_right((of_x(x), of_grad(grad), *others), stride, assert_as_accurate)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pixel", [(0, 0), (0, -1), (-1, 0), (-1, -1), (5, 0), (5, -1), (9, 15), (9, 16)], ids=str)
def test_what_is_not_finite_goes_where_it_does_in_dense_code(pixel, stride, random_mask):
    """A tap that reads beyond a row must meet zeros there, not the neighbouring row."""
    given = operands(random_mask((6, 5, 3, 3), 1.0), (2, 5, 32, 32), stride)
    x, grad = given[:2]
    x[(1, 2, *pixel)] = torch.inf
    for actual, expected in zip(results(*given, stride), torchs(*given, stride), strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
    x.normal_()
    grad[(1, 2, *(max(-1, i // stride) for i in pixel))] = torch.nan
    (_, x_grad, w_grad), (_, of_x, of_w) = results(*given, stride), torchs(*given, stride)
    assert torch.equal(x_grad.isnan(), of_x.isnan())
    # The padding's zeros, which torch leaves out, are factors here.
    assert w_grad.isnan()[of_w.isnan()].all()
    assert w_grad[torch.arange(6) != 2].isfinite().all()
