"""granet::norm: batch norm, residual and ReLU against torch's operations in float64, and the native code for it.

New memory holds NaN here, so an output that is not written everywhere fails.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from granet_kernels import norm
from granet_kernels.cpu_backend import library
from granet_kernels.reference import norm_backward_ref, norm_ref

OPS = torch.ops.granet
EPS = 1e-3
SHAPES = [
    (n, c, side, side)
    for n in (1, 5, 16)
    for c in (1, 7, 64)
    for side in (1, 3, 7, 16)
    if n * side > 1  # one value a channel has no variance
]
FORMS = {"plain": (False, False), "relu": (False, True), "residual": (True, False), "residual-relu": (True, True)}
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
ISAS = ["portable", "avx2", "avx512"]
needs_library = pytest.mark.skipif(library.unavailable() is not None, reason="no native library")
forms = pytest.mark.parametrize(("added", "relu"), FORMS.values(), ids=FORMS)
formats = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True)
def _one_thread_and_nan_in_new_memory():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def operands(shape, added, dtype=torch.float32, layout=torch.contiguous_format):
    """x of mean 0.5, gamma of both signs, beta, residual or None, gradient of y."""
    x, residual, grad = (torch.randn(shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(3))
    gamma, beta = torch.randn(shape[1], dtype=dtype), torch.randn(shape[1], dtype=dtype)
    return x + 0.5, gamma, beta, residual if added else None, grad


def torchs(x, gamma, beta, residual, eps, relu):
    y = F.batch_norm(x, None, None, gamma, beta, True, 0.0, eps)
    y = y if residual is None else y + residual
    dims = (0, 2, 3)
    return F.relu(y) if relu else y, x.mean(dims), x.var(dims, correction=0)


def results(function, x, gamma, beta, residual, grad, relu):
    """y, mean, var, and the gradients of x, gamma, beta and, if there is one, residual."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, gamma, beta, residual)]
    y, mean, var = function(*leaves, EPS, relu)
    gradients = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad)
    return y.detach(), mean.detach(), var.detach(), *gradients


def away_from_the_kink(x, gamma, beta, residual, grad, relu):
    """The operands with no gradient where rounding decides on which side of zero the activation is fed."""
    if not relu:
        return x, gamma, beta, residual, grad
    fed = torchs(*(None if t is None else t.double() for t in (x, gamma, beta, residual)), EPS, False)[0]
    return x, gamma, beta, residual, torch.where(fed.abs() < 1e-4, 0, grad)


def assert_as_torch(actual, tensors, relu, assert_as_accurate):
    theirs = results(torchs, *tensors, relu)
    exact = results(torchs, *(None if t is None else t.double() for t in tensors), relu)
    for index, (own, torch_own, true) in enumerate(zip(actual, theirs, exact, strict=True)):
        # Gradients are differences of sums: what is lost is in proportion to what was added up.
        slack = 0 if index < 3 else 1e-6 * float(tensors[4].double().norm())
        assert (own.double() - true).abs().max() <= max(
            2 * (torch_own.double() - true).abs().max(), slack + 4e-7 * true.abs().max()
        )
    assert_as_accurate(actual[0], theirs[0], exact[0])


def test_hand_worked():
    x = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).requires_grad_()
    gamma, beta = torch.tensor([2.0]), torch.tensor([0.5])
    y, mean, var = norm(x, gamma, beta, torch.tensor([1.0, 1.0]).reshape(2, 1, 1, 1), eps=0.0, relu=True)
    assert (y.flatten().tolist(), mean.tolist(), var.tolist()) == ([0.0, 3.5], [2.0], [1.0])
    assert not mean.requires_grad
    assert not var.requires_grad
    # What is cut off at zero has no gradient: g = (0, 1), xhat = (-1, 1), dx = 2 * (g - 1/2 - xhat * 1/2).
    assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == [0.0, 0.0]


@forms
@formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_torch(shape, layout, added, relu, assert_as_accurate):
    tensors = away_from_the_kink(*operands(shape, added, layout=layout), relu)
    assert_as_torch(results(norm, *tensors, relu), tensors, relu, assert_as_accurate)


PIXELS = [(5, 7, 1, 1), (1, 1, 7, 7), (16, 7, 3, 3), (5, 64, 16, 16)]
# Few pixels in NCHW: channels in one piece and in several, with a rest; one pixel too many, one image too few.
FEW = [(200, 40, 2, 2), (70, 9, 8, 8), (300, 300, 1, 2), (16, 70, 7, 7), (16, 3, 13, 5), (15, 20, 2, 2)]
# Channels that fill no vector, one and a part, several kinds of groups; rows of one piece, of several, of many items.
CHANNELS = [
    *((2, 2, 2, 1), (2, 63, 1, 1), (3, 3, 29, 31), (2, 17, 33, 3), (9, 63, 5, 7)),
    *((64, 100, 1, 1), (2, 512, 1, 1), (40, 512, 2, 3), (1, 48, 64, 64)),
]


@needs_library
@forms
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *((shape, torch.contiguous_format) for shape in (*PIXELS, *FEW)),
        *((shape, torch.channels_last) for shape in (*PIXELS, *CHANNELS)),
    ],
    ids=str,
)
def test_every_instruction_set_and_number_of_threads(shape, isa, layout, added, relu, assert_as_accurate, isa_used):
    tensors = away_from_the_kink(*operands(shape, added, layout=layout), relu)
    with isa_used(isa):
        actual = results(norm, *tensors, relu)
        for threads in (2, 4):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, actual, results(norm, *tensors, relu)))
    assert_as_torch(actual, tensors, relu, assert_as_accurate)


@needs_library
@formats
@pytest.mark.parametrize("side", [7, 9])
@pytest.mark.parametrize("isa", ISAS)
def test_a_large_mean_does_not_cancel(isa, side, layout, assert_as_accurate, isa_used):
    """Nor does one that moves from image to image or from pixel to pixel, by far more than the values do beside it."""
    values = torch.randn(40, 5, side, side)
    images = torch.linspace(-1e3, 2e3, 40)[:, None, None, None]
    for x in (values * 0.05 + 1000, values * 0.05 + images, values * 0.05 + torch.linspace(-1e3, 2e3, side)):
        x = x.contiguous(memory_format=layout)
        exact = x.double()
        with isa_used(isa):
            y, mean, var = norm(x, torch.ones(5), torch.zeros(5), eps=EPS)
        theirs, torch_mean, torch_var = torchs(x, torch.ones(5), torch.zeros(5), None, EPS, False)
        true, true_mean, true_var = torchs(exact, torch.ones(5).double(), torch.zeros(5).double(), None, EPS, False)
        # Without a fused multiply-add, the product of x and its scale is rounded before the mean is taken off.
        product = float((x.abs().amax((0, 2, 3)) / (true_var + EPS).sqrt()).max()) if isa == "portable" else 0
        error, torch_error = (float((t - true).abs().max()) for t in (y, theirs))
        assert error <= 2 * torch_error + torch.finfo(x.dtype).eps * max(product / 2, float(true.abs().max()))
        assert_as_accurate(mean, torch_mean, true_mean)
        torch.testing.assert_close(var.double(), true_var, rtol=1e-4, atol=0)
        rounding = 1e-6 + torch.finfo(x.dtype).eps * float(true_var.max())
        assert float((var - true_var).abs().max()) <= 2 * float((torch_var - true_var).abs().max()) + rounding


STRIDES = {
    "contiguous": (12, 4, 2, 1),
    "channels-last": (12, 1, 6, 3),
    "one channel": (4, 1, 2, 1),
    "one pixel": (3, 1, 1, 1),
    "one pixel, channels-last": (3, 1, 3, 3),
    "one image": (1, 1, 6, 3),
}


@pytest.mark.parametrize(("name", "strides"), STRIDES.items(), ids=STRIDES)
@pytest.mark.parametrize("other", [torch.contiguous_format, torch.channels_last], ids=FORMATS)
def test_results_have_the_strides_that_compiled_code_expects(name, strides, other):
    shape = (
        1 if name == "one image" else 3,
        1 if name == "one channel" else 3,
        *((1, 1) if "pixel" in name else (2, 2)),
    )
    x = torch.empty_strided(shape, strides).copy_(torch.randn(shape))
    assert x.stride() == strides
    _, gamma, beta, residual, grad = operands(shape, True, layout=other)
    true = norm_ref(x, gamma, beta, residual, EPS, True)
    backward = grad, x, true[0], gamma, beta, true[1], true[2], EPS, True
    expected = [*true, *norm_backward_ref(*backward)]
    actual = [*OPS.norm(x, gamma, beta, residual, EPS, True), *OPS.norm_backward(*backward)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [*OPS.norm(x, gamma, beta, residual, EPS, True), *OPS.norm_backward(*backward)]
    for own, result, fake in zip(actual, expected, fakes, strict=True):
        assert own.stride() == fake.stride()
        torch.testing.assert_close(own, result, rtol=1e-5, atol=1e-5)


@needs_library
@formats
def test_images_in_the_other_format_and_expanded_gradients(layout):
    x, gamma, beta, residual, grad = operands((3, 20, 5, 6), True, layout=layout)
    tensors = x, gamma, beta, residual, grad[:1, :1].expand(3, 20, 5, 6)
    expected = results(norm, *tensors[:4], tensors[4].contiguous(memory_format=layout), True)
    for other in FORMATS.values():
        given = x, gamma, beta, residual.contiguous(memory_format=other), tensors[4]
        assert all(map(torch.equal, expected, results(norm, *given, True)))


@needs_library
def test_dense_float32_runs_natively_and_nothing_else(monkeypatch):
    class Counting:
        calls = 0

        def __getattr__(self, name):
            Counting.calls += 1
            return getattr(native, name)

    native = library.load()
    monkeypatch.setattr(library, "load", Counting)
    x, gamma, beta, residual, grad = operands((2, 3, 4, 4), True)
    results(norm, x, gamma, beta, residual, grad, True)
    assert Counting.calls == 2
    last = x.contiguous(memory_format=torch.channels_last)
    results(norm, last, gamma, beta, residual, grad, True)
    assert Counting.calls == 4
    results(norm, *(t.double() for t in (x, gamma, beta, residual, grad)), True)
    results(norm, torch.cat([last, last], 1)[:, :3], gamma, beta, residual, grad, True)
    assert Counting.calls == 4
    # Operands of any strides are taken if x is dense.
    expanded = grad[:1, :1].expand(2, 3, 4, 4)
    for dense in (x, last):
        results(norm, dense, gamma.repeat(2)[::2], beta, residual.transpose(2, 3), expanded, True)
    assert Counting.calls == 8


LAYOUTS = {
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@forms
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strided_images(layout, added, relu):
    x, gamma, beta, residual, grad = away_from_the_kink(*operands((5, 7, 3, 4), added), relu)
    strided = [t if t is None else layout(t) for t in (x, residual, grad)]
    tensors = strided[0], gamma, beta, *strided[1:]
    actual = results(norm, *tensors, relu)
    for own, true in zip(actual, results(torchs, *tensors, relu), strict=True):
        torch.testing.assert_close(own, true, rtol=1e-5, atol=1e-5)
    assert actual[0].is_contiguous(memory_format=torch.channels_last) == (layout is LAYOUTS["channels-last"])


@forms
@formats
@pytest.mark.parametrize("isa", [None, *ISAS])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("spoiled", ["x", "gamma", "beta", "residual", "gradient"])
@pytest.mark.parametrize("channels", [5, 21])
def test_what_is_not_finite_is_where_torch_has_it(channels, spoiled, value, isa, layout, added, relu, isa_used):
    """The result is torch's. Where a gradient is not finite, sums in another order make NaN of torch's inf."""
    tensors = away_from_the_kink(*operands((3, channels, 3, 7), added, layout=layout), relu)
    target = dict(zip(["x", "gamma", "beta", "residual", "gradient"], tensors, strict=True))[spoiled]
    if target is None:
        pytest.skip("there is no residual")
    target[(0, 2, 0, 0) if target.dim() == 4 else 2] = value
    if isa is None:
        tensors = [t if t is None else t.double() for t in tensors]
        actual = results(norm, *tensors, relu)
    else:
        if library.unavailable() is not None:
            pytest.skip("no native library")
        with isa_used(isa):
            actual = results(norm, *tensors, relu)
    for index, (own, true) in enumerate(zip(actual, results(torchs, *tensors, relu), strict=True)):
        if index >= 3:
            own, true = (torch.where(t.isfinite(), t, torch.nan) for t in (own, true))
        torch.testing.assert_close(own, true, equal_nan=True, rtol=1e-4, atol=1e-4)


@forms
def test_gradcheck_twice(added, relu):
    *tensors, _ = operands((3, 2, 2, 2), added, torch.float64)
    leaves = [t if t is None else t.requires_grad_() for t in tensors]

    def function(*tensors):
        return norm(*tensors, EPS, relu)[0]

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@forms
def test_a_gradient_penalty_is_torchs(added, relu):
    """Second derivatives behind the native op too."""
    *tensors, grad = away_from_the_kink(*operands((4, 3, 3, 3), added), relu)

    def penalty_gradients(function):
        leaves = [t.detach().requires_grad_() for t in tensors if t is not None]
        padded = leaves if added else [*leaves, None]
        y = function(*padded, EPS, relu)[0]
        first = torch.autograd.grad((y.sin() * grad).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for own, true in zip(penalty_gradients(norm), penalty_gradients(torchs), strict=True):
        torch.testing.assert_close(own, true, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("needed", range(4), ids=["x", "gamma", "beta", "residual"])
def test_each_gradient_alone(needed):
    *tensors, grad = away_from_the_kink(*operands((4, 3, 3, 3), True), True)
    everything = results(norm, *tensors, grad, True)[3:]
    tensors[needed].requires_grad_()
    (alone,) = torch.autograd.grad(norm(*tensors, EPS, True)[0], tensors[needed], grad)
    assert torch.equal(alone, everything[needed])


@forms
@pytest.mark.parametrize("layout", [torch.clone, LAYOUTS["channels-last"]], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, layout, added, relu):
    torch.use_deterministic_algorithms(False)
    x, gamma, beta, residual, grad = operands((3, 4, 3, 3), added, dtype)
    x, grad = layout(x), layout(grad)
    leaves = [t if t is None else t.requires_grad_() for t in (x, gamma, beta, residual)]
    torch.library.opcheck(OPS.norm.default, (*leaves, EPS, relu))
    y, mean, invstd, _ = OPS.norm(*leaves, EPS, relu)
    saved = y.detach() if added and relu else None
    backward = grad.requires_grad_(), x, saved, gamma, beta.detach(), mean, invstd, EPS, relu
    torch.library.opcheck(OPS.norm_backward.default, backward)


def test_compiled_without_a_break(compiled_once):
    *tensors, grad = operands((3, 4, 3, 3), True)

    def function(*tensors):
        return norm(*tensors, EPS, True)[0]

    leaves = [t.requires_grad_() for t in tensors]
    actual = torch.autograd.grad(compiled_once(function)(*leaves), leaves, grad)
    assert all(map(torch.equal, actual, torch.autograd.grad(function(*leaves), leaves, grad)))


def test_flops_are_not_counted():
    *tensors, _ = operands((3, 4, 3, 3), True)
    with FlopCounterMode(display=False) as counter:
        norm(*(t.requires_grad_() for t in tensors), EPS, True)[0].sum().backward()
    assert counter.get_total_flops() == 0


BAD = {
    "x dtype": ({"x": torch.ones(2, 3, 4, 4).half()}, "expected x of dtype float32 or float64, got torch.float16"),
    "x 3-D": ({"x": torch.ones(2, 3, 4)}, r"expected x of shape \(n, c, h, w\), got shape \(2, 3, 4\)"),
    "one value": ({"x": torch.ones(1, 3, 1, 1)}, r"more than one value a channel, got shape \(1, 3, 1, 1\)"),
    "no value": ({"x": torch.ones(0, 3, 4, 4)}, r"more than one value a channel, got shape \(0, 3, 4, 4\)"),
    "gamma dtype": ({"gamma": torch.ones(3).double()}, "expected gamma of dtype torch.float32, got torch.float64"),
    "gamma shape": ({"gamma": torch.ones(4)}, r"expected gamma of shape \(3,\), got shape \(4,\)"),
    "beta device": ({"beta": torch.ones(3, device="meta")}, "expected beta on device cpu, got one on meta"),
    "residual dtype": ({"residual": torch.ones(2, 3, 4, 4).double()}, "expected residual of dtype torch.float32, got"),
    "residual shape": ({"residual": torch.ones(2, 1, 4, 4)}, r"of the shape of x \(2, 3, 4, 4\), got .*\(2, 1, 4, 4\)"),
    "eps": ({"eps": -1.0}, r"expected eps >= 0, got -1.0"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(change, message):
    good = {"x": torch.ones(2, 3, 4, 4), "gamma": torch.ones(3), "beta": torch.ones(3)}
    with pytest.raises(ValueError, match=f"norm: .*{message}"):
        norm(**{**good, **change})


@pytest.mark.parametrize("part", ["x", "gamma", "residual", "gradient", "mean"])
def test_ops_refuse_operands_that_do_not_belong_together(part):
    x, gamma, beta, residual, grad = operands((2, 3, 4, 4), True)
    calls = {
        "x": lambda: OPS.norm(x[0], gamma, beta, None, EPS, False),
        "gamma": lambda: OPS.norm(x, gamma[:2], beta, None, EPS, False),
        "residual": lambda: OPS.norm(x, gamma, beta, residual[:1], EPS, False),
        "gradient": lambda: OPS.norm_backward(grad[:, :2], x, None, gamma, beta, gamma, gamma, EPS, False),
        "mean": lambda: OPS.norm_backward(grad, x, None, gamma, beta, gamma[:1], gamma, EPS, False),
    }
    with pytest.raises(ValueError, match="norm: expected"):
        calls[part]()
