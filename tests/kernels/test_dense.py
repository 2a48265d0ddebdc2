"""The dense implementation of the ops gives what the reference gives, in the same layout; to the bit where it can."""

from __future__ import annotations

import pytest
import torch

import granet_kernels
from granet_kernels import plan, reference
from granet_kernels.cpu_backend import dense

DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
# name: (x shape, weight shape, stride, padding, dilation, groups)
GEOMETRIES = {
    "3x3": ((4, 16, 9, 8), (24, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "1x1": ((4, 16, 9, 8), (24, 16, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "stride": ((2, 3, 13, 12), (4, 3, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "uneven": ((1, 3, 9, 13), (2, 3, 2, 3), (2, 1), (0, 2), (1, 3), 1),
    "groups": ((2, 6, 8, 7), (4, 3, 3, 2), (1, 2), (1, 1), (1, 1), 2),
    "depthwise": ((2, 6, 7, 7), (6, 1, 3, 3), (1, 1), (1, 1), (1, 1), 6),
    "empty": ((0, 3, 7, 6), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1), 1),
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.fixture(autouse=True)
def _nan_in_new_memory():
    """So that a buffer that only lends its shape is seen if it is read."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("w_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("x_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_conv2d(geometry, dtype, x_format, w_format, random_mask):
    x_shape, w_shape, *rest = geometry
    x = torch.randn(x_shape).to(dtype).contiguous(memory_format=x_format)
    weight = torch.randn(w_shape).to(dtype).contiguous(memory_format=w_format)
    mask, bias = random_mask(w_shape, 0.3).contiguous(memory_format=w_format), torch.randn(w_shape[0]).to(dtype)
    y = reference.conv2d_ref(x, weight, mask, bias, *rest)
    grad = torch.randn(y.shape).to(dtype).contiguous(memory_format=x_format)
    pairs = [
        (y, dense.conv2d(x, weight, mask, bias, *rest)),
        (
            reference.conv2d_dgrad_ref(grad, weight, mask, x_shape, *rest),
            dense.conv2d_dgrad(grad, weight, mask, x_shape, *rest),
        ),
        (reference.conv2d_wgrad_ref(grad, x, mask, *rest), dense.conv2d_wgrad(grad, x, mask, *rest)),
    ]
    for expected, got in pairs:
        assert got.stride() == expected.stride() or not got.numel()
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=16 * tolerance)
    assert torch.equal(pairs[0][0], pairs[0][1])
    assert pairs[2][1][~mask].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_linear(transposed, dtype, random_mask):
    mask = random_mask((7, 9), 0.4)
    x, grad, weight, bias = (torch.randn(shape).to(dtype) for shape in ((5, 9), (5, 7), (7, 9), (7,)))
    if transposed:
        mask, weight = mask.t().contiguous().t(), weight.t().contiguous().t()
    assert torch.equal(dense.linear(x, weight, mask, bias), reference.linear_ref(x, weight, mask, bias))
    assert torch.equal(dense.linear_dgrad(grad, weight, mask), reference.linear_dgrad_ref(grad, weight, mask))
    w_grad, expected = dense.linear_wgrad(grad, x, mask), reference.linear_wgrad_ref(grad, x, mask)
    assert torch.equal(w_grad, expected)
    assert w_grad.stride() == mask.stride()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_masking_selects_whatever_the_value(dtype):
    values = torch.tensor([1.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-7]).to(dtype).repeat(2)
    mask = torch.tensor([True] * 6 + [False] * 6)
    got = dense.masked(values, mask, full=False)
    expected = torch.where(mask, values, 0)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got.signbit(), expected.signbit())


def test_a_full_mask_masks_nothing():
    mask, values = torch.ones(3, 4, dtype=torch.bool), torch.randn(3, 4)
    assert dense.masked(values, mask, full=True) is values


def test_autocast_does_not_reach_inside():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    mask = torch.rand(4, 8) < 0.5
    image, kernel = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    keep = torch.rand(4, 3, 3, 3) < 0.5
    with plan.use("dense"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert granet_kernels.linear(x, weight, mask).dtype == torch.float32
        assert granet_kernels.conv2d(image, kernel, keep).dtype == torch.float32
