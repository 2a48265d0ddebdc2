"""1 x 1 convolutions in channels_last, natively: linear layers of all pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import ISAS
from torch.nn.grad import conv2d_weight

from granet_kernels import plan
from granet_kernels.conv2d import conv2d_op
from granet_kernels.cpu_backend import library
from granet_kernels.cpu_backend.calls import find_gradients
from granet_kernels.layout import layout_of

OPS = torch.ops.granet
GEOMETRY = [[1, 1], [0, 0], [1, 1], 1]
NHWC, NCHW = torch.channels_last, torch.contiguous_format
# Images, channels, height, width, outputs.
SIZES = [(3, 16, 5, 7, 20), (1, 7, 1, 63, 2), (40, 63, 2, 2, 100), (1, 300, 16, 16, 40), (2, 3, 9, 1, 5)]

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="no native library")


@pytest.fixture(autouse=True)
def _native():
    with plan.use("native"):
        yield


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operands(random_mask, sizes, density=0.3):
    n, channels, h, w, outputs = sizes
    mask = random_mask((outputs, channels, 1, 1), density)
    weight = torch.randn(mask.shape).contiguous(memory_format=NHWC)
    x, grad = torch.randn(n, channels, h, w), torch.randn(n, outputs, h, w)
    return (
        x.contiguous(memory_format=NHWC),
        grad.contiguous(memory_format=NHWC),
        weight,
        mask.contiguous(),
        torch.randn(outputs),
    )


def rows(images):
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_bits_of_a_linear_layer(sizes, isa, random_mask, isa_used):
    x, grad, weight, mask, bias = operands(random_mask, sizes)
    w, m = weight.flatten(1).contiguous(), mask.flatten(1).contiguous()
    with isa_used(isa):
        y = OPS.conv2d(x, weight, mask, bias, *GEOMETRY, None)
        x_grad = OPS.conv2d_dgrad(grad, weight, mask, x.shape, *GEOMETRY, None)
        w_grad = OPS.conv2d_wgrad(grad, x, mask, *GEOMETRY, None)
        assert torch.equal(rows(y), OPS.linear(rows(x), w, m, bias, None))
        assert torch.equal(rows(x_grad), OPS.linear_dgrad(rows(grad), w, m, None))
        assert torch.equal(w_grad.flatten(1), OPS.linear_wgrad(rows(grad), rows(x), m, None))


def formats_of(image):
    """The image in both formats, as part of the channels of another one, and with rows that do not follow."""
    n, c, h, w = image.shape
    channels = torch.randn(n, c + 3, h, w).contiguous(memory_format=NHWC)[:, 1 : 1 + c].copy_(image)
    columns = torch.randn(n, c, h, w + 2).contiguous(memory_format=NHWC)[..., :w].copy_(image)
    return {"nhwc": image, "nchw": image.contiguous(), "some channels": channels, "some columns": columns}


FORMATS = ["nhwc", "nchw", "some channels", "some columns"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("density", [0.05, 0.2])
@pytest.mark.parametrize("of_grad", FORMATS)
@pytest.mark.parametrize("of_x", FORMATS)
def test_any_two_formats(of_x, of_grad, density, isa, random_mask, isa_used):
    """Both gradients in one call give the bits of each alone, whichever of the two is a linear layer's."""
    with isa_used(isa):
        assert_right(*operands(random_mask, (70, 40, 3, 5, 48), density), of_x, of_grad)


def assert_right(x, grad, weight, mask, bias, of_x, of_grad):
    x, grad = formats_of(x)[of_x], formats_of(grad)[of_grad]
    kept = torch.where(mask, weight, 0)
    expected = F.conv2d(x.double(), kept.double(), bias.double())
    torch.testing.assert_close(
        OPS.conv2d(x, weight, mask, bias, *GEOMETRY, None).double(), expected, rtol=1e-5, atol=1e-5
    )
    x_grad = OPS.conv2d_dgrad(grad, weight, mask, x.shape, *GEOMETRY, None)
    w_grad = OPS.conv2d_wgrad(grad, x, mask, *GEOMETRY, None)
    torch.testing.assert_close(x_grad, F.conv_transpose2d(grad, kept), rtol=1e-4, atol=1e-5)
    dense = conv2d_weight(x.double(), mask.shape, grad.double())
    torch.testing.assert_close(w_grad.double(), torch.where(mask, dense, 0), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        both = conv2d_op.gradients(grad, x, weight, mask, *GEOMETRY, None)
    assert both is not None
    assert torch.equal(both[0], x_grad)
    assert torch.equal(both[1], w_grad)


@pytest.mark.parametrize("isa", ISAS)
def test_one_walk_over_the_weight_for_both_gradients(isa, random_mask, one_thread, isa_used):
    x, grad, weight, mask, _ = operands(random_mask, (70, 40, 3, 5, 48), 0.2)
    dgrad, wgrad = find_gradients("conv2d", grad, x, weight, mask, *GEOMETRY)
    geometry = layout_of(mask).native, dgrad.conv, dgrad.first, wgrad.second, dgrad.second, dgrad.threads
    with isa_used(isa):
        assert library.load().granet_conv2d_reads_once(*geometry) == 2
