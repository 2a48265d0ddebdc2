"""Max-pooling of 2 x 2 pixels against torch's, whose values and gradients it gives exactly."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import granet_kernels
from granet_kernels.cpu_backend import library
from granet_kernels.pool import max_pool_op
from granet_kernels.reference import max_pool_backward_ref

SHAPES = [(1, 1, 2, 2), (2, 3, 4, 4), (3, 5, 7, 9), (2, 2, 32, 32), (1, 3, 33, 66), (0, 3, 4, 4)]
# Rows of half a vector of outputs or less, of whole vectors and with a rest, of planes together and one by one.
SHAPES += [(7, 9, 2, 2), (5, 7, 6, 4), (3, 11, 8, 8), (2, 5, 10, 16), (3, 3, 37, 8), (3, 5, 6, 9), (400, 90, 2, 4)]


def inputs(shape, dtype=torch.float32):
    """Many equal values, and some NaN, inf and -inf."""
    x = torch.randint(-3, 4, shape).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    return torch.where(torch.rand(shape) < 0.1, special[torch.randint(0, 3, shape)], x)


def results(function, x, g):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), *torch.autograd.grad(y, x, g)


def assert_as_torch(x, g):
    expected = results(lambda x: F.max_pool2d(x, 2), x, g)
    for got, wanted in zip(results(granet_kernels.max_pool, x, g), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def gradient_for(shape, dtype=torch.float32):
    return torch.randn(*shape[:2], shape[2] // 2, shape[3] // 2).to(dtype)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native(shape, isa, threads, isa_used):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with isa_used(isa):
            assert_as_torch(inputs(shape), gradient_for(shape))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference(shape, monkeypatch):
    monkeypatch.setattr(library, "load", lambda: None)
    assert_as_torch(inputs(shape), gradient_for(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_layouts(dtype):
    shape = (2, 8, 6, 6)
    assert_as_torch(inputs(shape, dtype).to(memory_format=torch.channels_last), gradient_for(shape, dtype))


def test_strided_and_expanded_gradients():
    x = torch.randn(2, 3, 8, 8)[:, :, 1:7, ::2]
    for g in (torch.ones(()).expand(2, 3, 3, 2), torch.randn(2, 3, 3, 4)[..., ::2]):
        assert_as_torch(x, g)


def test_second_derivatives():
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: granet_kernels.max_pool(x) ** 2, x)


def test_no_gradient_arrives():
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    Drop.apply(granet_kernels.max_pool(x)).sum().backward()
    assert x.grad is None


def test_opcheck():
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    opcheck(torch.ops.granet.max_pool.default, (x,))
    _, which = max_pool_op(x.detach())
    opcheck(torch.ops.granet.max_pool_backward.default, (torch.randn(2, 3, 3, 2, requires_grad=True), which, 6, 5))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 4), r"expected x of shape \(n, c, h >= 2, w >= 2\), got shape \(2, 3, 4\)"),
        (torch.zeros(2, 3, 1, 4), "h >= 2"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int32), "floating-point dtype, got torch.int32"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(ValueError, match=message):
        granet_kernels.max_pool(x)


@pytest.mark.parametrize("which", [torch.ones(1, 1, 1, 1, dtype=torch.uint8), torch.ones(2, 3, 2, 2)])
def test_choices_that_do_not_fit_the_gradient_are_for_the_specification(which):
    """torch.ops.granet.max_pool_backward takes anything, and the library reads as much as the gradient says."""
    grad = torch.randn(2, 3, 2, 2)
    got = torch.ops.granet.max_pool_backward(grad, which, 5, 4)
    assert torch.equal(got, max_pool_backward_ref(grad, which, 5, 4))
    with pytest.raises(RuntimeError):
        torch.ops.granet.max_pool_backward(grad, which, 16, 16)
