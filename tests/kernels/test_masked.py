"""Dense weights and gradients under their masks: left alone where they are zero off them, else masked to the bit."""

from __future__ import annotations

import pytest
import torch

from granet_kernels import conv2d, linear, plan
from granet_kernels.cpu_backend import dense, library

SIZES = [1, 7, 15, 16, 63, 100, 300, 1024, 70_001, 200_000]
needs_library = pytest.mark.skipif(library.unavailable() is not None, reason="no native library")


def values_of(size):
    """Numbers of all kinds, a NaN, infinities, both zeros and a denormal among them."""
    values = torch.randn(size)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-42])
    return torch.where(torch.rand(size) < 0.2, special[torch.randint(0, len(special), (size,))], values)


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@needs_library
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_as_where(density, isa, threads, random_mask, isa_used):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with isa_used(isa):
            for size in SIZES:
                mask, values = random_mask((size,), density), values_of(size)
                expected = torch.where(mask, values, 0)
                assert same_bits(dense.masked(values, mask), expected)
                assert dense.masked(expected, mask) is expected
                gradient = values.clone()
                assert dense.as_gradient(gradient, mask) is gradient
                assert same_bits(gradient, expected)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("value", [1e-45, -0.0, torch.nan, -torch.inf], ids=str)
def test_one_value_off_the_mask_is_seen_wherever_it_is(value, isa, isa_used):
    size = 2100  # several blocks of vectors, and a rest
    mask, values = torch.zeros(size, dtype=torch.bool), torch.zeros(size)
    with isa_used(isa):
        for place in [*range(0, size, 97), *range(size - 20, size)]:
            values[place] = value
            got = dense.masked(values, mask)
            assert got is not values
            assert same_bits(got, torch.zeros(size))
            mask[place] = True
            assert dense.masked(values, mask) is values
            mask[place], values[place] = False, 0.0


LAYOUTS = {
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
}


@pytest.mark.parametrize("of_values", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("of_mask", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_any_layout_and_dtype(dtype, of_mask, of_values, random_mask):
    mask = of_mask(random_mask((7, 5, 3, 4), 0.4))
    values = of_values(torch.randn(7, 5, 3, 4).to(dtype))
    expected = torch.where(mask, values, 0)
    assert torch.equal(dense.masked(values, mask), expected)
    assert torch.equal(dense.masked(of_values(expected), mask), expected)
    gradient = dense.as_gradient(values.clone(), mask)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("shape", [(6, 9), (600, 900)], ids=["small", "large"])
@pytest.mark.parametrize("zeroed", [True, False], ids=["zero off the mask", "any values"])
def test_a_layer_trains_the_same_whatever_its_weight_holds_off_the_mask(zeroed, shape, random_mask):
    mask, full = random_mask(shape, 0.5), torch.randn(shape)
    weight = (torch.where(mask, full, 0) if zeroed else full.clone()).requires_grad_()
    reference = torch.where(mask, full, 0).requires_grad_()
    x, grad = torch.randn(5, shape[1]), torch.randn(5, shape[0])
    with plan.use("dense"):
        y = linear(x, weight, mask)
    y.backward(grad)
    expected = torch.nn.functional.linear(x, reference)
    expected.backward(grad)
    assert torch.equal(y, expected)
    torch.testing.assert_close(weight.grad, torch.where(mask, reference.grad, 0), rtol=1e-5, atol=1e-5)
    assert weight.grad[~mask].count_nonzero() == 0


@needs_library
def test_a_graph_holds_the_weight_itself(random_mask):
    mask = random_mask((6, 9), 0.5)
    weight, x = torch.randn(6, 9).where(mask, 0).requires_grad_(), torch.randn(5, 9, requires_grad=True)
    with plan.use("dense"):
        y = linear(x, weight, mask)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # as of torch's own layer
        y.sum().backward()


NAMES = {"linear": ((4, 6), (5, 6)), "conv2d": ((2, 5, 6, 6), (4, 5, 3, 3))}


@pytest.mark.parametrize("zeroed", [True, False], ids=["zero off the mask", "any values"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_gradients_leave_tensors_of_others_alone(name, zeroed, random_mask):
    x_shape, w_shape = NAMES[name]
    mask, weight = random_mask(w_shape, 0.5), torch.randn(w_shape)
    weight = (weight.where(mask, 0) if zeroed else weight.clone()).requires_grad_()
    x = torch.randn(x_shape, requires_grad=True)
    layer = {"linear": linear, "conv2d": conv2d}[name]
    with plan.use("dense"):
        (gradient,) = torch.autograd.grad(layer(x, weight, mask).square().sum(), weight, create_graph=True)
    vector = torch.randn(w_shape)
    given = vector.clone()
    (of_x,) = torch.autograd.grad(gradient, x, vector, retain_graph=True)
    assert torch.equal(vector, given)
    torch_layer = {"linear": torch.nn.functional.linear, "conv2d": torch.nn.functional.conv2d}[name]
    masked = weight.detach().where(mask, 0).requires_grad_()
    (expected,) = torch.autograd.grad(torch_layer(x, masked).square().sum(), masked, create_graph=True)
    torch.testing.assert_close(gradient, expected.where(mask, 0))
    torch.testing.assert_close(of_x, torch.autograd.grad(expected, x, given.where(mask, 0))[0], rtol=1e-4, atol=1e-4)
    gradient.sum().backward()  # an expanded gradient


@pytest.mark.parametrize("shape", [(9, 5), (2, 5), (5,)], ids=["longer", "shorter", "other dimensions"])
def test_a_mask_of_another_shape_or_dtype_is_no_mask_for_the_library(shape):
    values = torch.zeros(4, 5)
    assert not dense.is_zero_off(values, torch.ones(shape, dtype=torch.bool))
    assert not dense.is_zero_off(values, torch.ones(4, 5, dtype=torch.uint8))
