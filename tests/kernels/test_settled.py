"""A call like the last one goes its way, past the ops or by them, and is not looked at; one that differs is."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from granet_kernels import conv2d, eager, linear, plain, plan
from granet_kernels.cpu_backend import calls, library
from granet_kernels.cpu_backend.calls import find_call
from granet_kernels.layout import known_layout, layout_of

pytestmark = pytest.mark.skipif(library.load() is None, reason="no native library to tell that a weight is zero")

LINEAR = import_module("granet_kernels.linear")  # the function of the same name hides it


@pytest.fixture(autouse=True, params=["dense", "native"])
def way(request):
    """Past the ops, and by them."""
    with plan.use(request.param):
        yield request.param


@pytest.fixture
def looks(monkeypatch):
    """One entry for each call whose operands were looked at."""
    seen = []
    weight = plain._weight
    monkeypatch.setattr(plain, "_weight", lambda *args, **given: seen.append(args) or weight(*args, **given))
    return seen


def operands(mask, x_shape=(9, 33)):
    weight = nn.Parameter(torch.randn(mask.shape).where(mask, 0))
    return torch.randn(x_shape, requires_grad=True), weight, nn.Parameter(torch.randn(mask.shape[0]))


def results(layer, x, weight, bias):
    y = layer(x, weight, bias)
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return y, *torch.autograd.grad(y, [t for t in (x, weight, bias) if t is not None and t.requires_grad], grad)


def expected(x, weight, bias, mask, flag=False):
    effective = weight.detach().where(mask, 0).requires_grad_(weight.requires_grad)
    y, *grads = results(F.linear, x, effective, bias)
    return y, *(g if flag or g.shape != mask.shape else g.where(mask, 0) for g in grads)


def check(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, 0.6, 1.0])
def test_the_same_bits_without_a_look(density, random_mask, looks):
    mask = random_mask((17, 33), density)
    x, weight, bias = operands(mask)
    first = results(lambda *t: linear(t[0], t[1], mask, t[2]), x, weight, bias)
    assert len(looks) == 1
    again = results(lambda *t: linear(t[0], t[1], mask, t[2]), x, weight, bias)
    assert len(looks) == 1
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    check(again, expected(x, weight, bias, mask))
    assert again[2][~mask].count_nonzero() == 0
    with torch.no_grad():
        weight.mul_(2)  # as an optimizer does
    check(results(lambda *t: linear(t[0], t[1], mask, t[2]), x, weight, bias), expected(x, weight, bias, mask))
    assert len(looks) == 1


@pytest.mark.parametrize("shape", [(33,), (2, 3, 33), (0, 5, 33)], ids=str)
def test_any_number_of_dimensions(shape, random_mask, looks, way):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask, shape)
    first = results(lambda *t: linear(t[0], t[1], mask, t[2]), x, weight, bias)
    again = results(lambda *t: linear(t[0], t[1], mask, t[2]), x, weight, bias)
    assert len(looks) == (2 if way == "native" and 0 in shape else 1)  # which is not for the library
    assert again[0].shape == (*shape[:-1], 17)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    check(again, expected(x, weight, bias, mask))


def another_x(x, weight, bias, mask):
    return torch.randn(5, 33, requires_grad=True), weight, bias


def strided_x(x, weight, bias, mask):
    return x.detach().t().contiguous().t().requires_grad_(), weight, bias


def constant_x(x, weight, bias, mask):
    return x.detach(), weight, bias


def another_weight(x, weight, bias, mask):
    return x, nn.Parameter(weight.detach() * 2), bias


def negative_weight(x, weight, bias, mask):
    weight.data = torch._neg_view(weight.data.clone())
    return x, weight, bias


def frozen_weight(x, weight, bias, mask):
    return x, weight.requires_grad_(False), bias


def weight_off_the_mask(x, weight, bias, mask):
    weight.data.add_(1)
    return x, weight, bias


def weight_of_other_strides(x, weight, bias, mask):
    weight.data = weight.data.t().contiguous().t()
    return x, weight, bias


def no_bias(x, weight, bias, mask):
    return x, weight, None


def another_mask(x, weight, bias, mask):
    mask.logical_not_()
    return x, weight, bias


def emptied_mask(x, weight, bias, mask):
    mask.zero_()
    return x, weight, bias


def assigned_mask(x, weight, bias, mask):
    for _ in range(3):  # one may come to lie where the first did
        mask.data = ~mask
    return x, weight, bias


def mask_of_other_strides(x, weight, bias, mask):
    square = torch.zeros(33, 33, dtype=torch.bool)
    square[:17] = mask
    mask.data = square.t()[:17]  # other values, and at another place
    return x, weight, bias


CHANGES = (
    *(another_x, strided_x, constant_x, another_weight, negative_weight, frozen_weight, weight_off_the_mask),
    *(weight_of_other_strides, no_bias, another_mask, emptied_mask, assigned_mask, mask_of_other_strides),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("density", [0.6, 1.0])
def test_what_differs_is_looked_at(density, change, random_mask, looks, way):
    mask = random_mask((17, 33), density)
    x, weight, bias = operands(mask)
    linear(x, weight, mask, bias)
    x, weight, bias = change(x, weight, bias, mask)
    check(results(lambda *t: linear(t[0], t[1], mask, t[2]), x, weight, bias), expected(x, weight, bias, mask))
    is_as_good = change is another_weight or (change is weight_off_the_mask and (density == 1.0 or way == "native"))
    is_for_the_dispatcher = change is negative_weight
    assert len(looks) == (1 if is_as_good or is_for_the_dispatcher else 2)


def test_what_does_not_fit_is_refused(random_mask):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    linear(x, weight, mask, bias)
    with pytest.raises(ValueError, match="expected x of dtype"):
        linear(x.double(), weight, mask, bias)
    with pytest.raises(ValueError, match="expected x of shape"):
        linear(x[:, :5], weight, mask, bias)
    with pytest.raises(ValueError, match="expected dense_wgrad"):
        linear(x, weight, mask, bias, True)
    kept = mask.data
    for data, message in ((kept[:5], "expected mask of the weight's shape"), (kept.view(torch.uint8), "torch.bool")):
        mask.data = data
        with pytest.raises(ValueError, match=message):
            linear(x, weight, mask, bias)
    mask.data = kept
    bias.data = bias.data[:1]  # torch would spread it over all features
    with pytest.raises(ValueError, match="expected bias of shape"):
        linear(x, weight, mask, bias)
    weight.data = weight.data[:5]
    with pytest.raises(ValueError, match="expected mask of the weight's shape"):
        linear(x, weight, mask, bias)


@pytest.mark.parametrize(
    "around",
    [lambda: torch.autocast("cpu", torch.bfloat16), lambda: plan.use("rule")],
    ids=["autocast", "another plan"],
)
def test_the_state_of_the_process_counts(around, random_mask, looks):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    linear(x, weight, mask, bias)
    with around():
        linear(x, weight, mask, bias)
    assert len(looks) == 2


def test_threads_count(random_mask, looks, monkeypatch):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    linear(x, weight, mask, bias)
    monkeypatch.setattr(library, "threads", lambda: 7)
    linear(x, weight, mask, bias)
    assert len(looks) == 2


def test_transforms_see_the_op(random_mask, monkeypatch):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    y = linear(x, weight, mask, bias)
    seen, run = [], LINEAR.linear_op.run
    with monkeypatch.context() as patch:
        patch.setattr(LINEAR.linear_op, "run", lambda *operands: seen.append(operands) or run(*operands))
        batch = torch.stack([x, 2 * x])
        torch.testing.assert_close(torch.func.vmap(lambda x: linear(x, weight, mask, bias))(batch)[0], y)
    assert len(seen) == 1
    compiled = torch.compile(lambda x: linear(x, weight, mask, bias), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)


def test_whoever_watches_sees_the_op(random_mask, way):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    if way == "native":
        y = linear(x, weight, mask, bias)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            linear(x, weight, mask, bias)
        assert "granet::linear" in {event.name for event in profiler.events()}
        with LINEAR.linear_op.computed_by("cpu", lambda *operands: torch.zeros(9, 17)):
            assert linear(x, weight, mask, bias).count_nonzero() == 0
        torch.testing.assert_close(linear(x, weight, mask, bias), y)


def test_no_gradients_are_prepared_for_nothing(random_mask, looks):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    y = linear(x, weight, mask, bias)
    with torch.no_grad():
        again = linear(x, weight, mask, bias)
    assert len(looks) == 1
    assert torch.equal(again, y)
    assert not again.requires_grad


@pytest.mark.parametrize("times", [1, 2])
def test_the_flag_is_read_in_the_backward_pass(times, random_mask):
    mask, flag = random_mask((17, 33), 0.6), torch.tensor(False)
    x, weight, bias = operands(mask)
    for _ in range(times):
        y = linear(x, weight, mask, bias, flag)
    flag.fill_(True)
    y.sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(17, 33))


@pytest.mark.parametrize("times", [1, 2])
def test_a_mask_assigned_before_the_backward_pass(times, random_mask, way):
    """Autograd does not count it, and hands the backward pass what there is then."""
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    for _ in range(times):
        y = linear(x, weight, mask, bias)
    mask.data = ~mask
    y.sum().backward()
    assert weight.grad[~mask].count_nonzero() == 0
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(17, 33).where(mask, 0))


def test_hooks_on_saved_tensors(random_mask):
    """What they hand back may lie in memory as no tensor that was looked at did."""
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    wanted = expected(x, weight, bias, mask)
    linear(x, weight, mask, bias)
    with plan.use("native"):
        y = linear(x, weight, mask, bias)
        for saved in y.grad_fn._raw_saved_tensors:
            saved.register_hooks(lambda t: t, lambda t: torch._neg_view(-t) if t.is_floating_point() else t)
        grad = torch.linspace(-1, 1, y.numel()).view(y.shape)
        check((y, *torch.autograd.grad(y, (x, weight, bias), grad)), wanted)


@pytest.mark.skipif(eager._top_hooks is None, reason="before torch 2.8 checkpoints alone are seen")
def test_packed_tensors_are_for_the_op(random_mask, looks):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    linear(x, weight, mask, bias)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        linear(x, weight, mask, bias)
    assert len(looks) == 2


def test_what_the_library_turns_out_not_to_take(random_mask, looks):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    linear(x, weight, mask, bias)
    find_call("linear", "forward", x, weight, mask, bias).supported = False
    try:
        check(results(lambda *t: linear(t[0], t[1], mask, t[2]), x, weight, bias), expected(x, weight, bias, mask))
        assert len(looks) == 2
    finally:
        calls._calls.clear()
        calls._gradients.clear()


@pytest.mark.parametrize("times", [1, 2])
def test_a_mask_changed_before_the_backward_pass(times, random_mask):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    for _ in range(times):
        y = linear(x, weight, mask, bias)
    mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_second_derivative(random_mask):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)

    def penalty(layer):
        (w_grad,) = torch.autograd.grad(layer(x).square().sum(), weight, create_graph=True)
        return torch.autograd.grad(w_grad.square().sum(), (x, weight))

    linear(x, weight, mask, bias)
    got = penalty(lambda x: linear(x, weight, mask, bias))
    masked = penalty(lambda x: LINEAR.linear_op(x, weight, mask, bias, None))
    for a, b in zip(got, masked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)
    assert got[1][~mask].count_nonzero() == 0


def test_a_convolution_and_its_geometry(random_mask, looks):
    mask = random_mask((6, 5, 3, 3), 0.6).contiguous(memory_format=torch.channels_last)
    weight = nn.Parameter(torch.randn(mask.shape).where(mask, 0).contiguous(memory_format=torch.channels_last))
    x = torch.randn(2, 5, 8, 8, requires_grad=True)
    for index, stride in enumerate([(1, 1), (1, 1), (2, 2), (2, 2), (1, 2)]):
        geometry = stride, (1, 1), (1, 1)
        y, x_grad, w_grad = results(lambda x, w, _, g=geometry: conv2d(x, w, mask, None, *g), x, weight, None)
        masked = weight.detach().where(mask, 0).requires_grad_()
        ey, ex, ew = results(lambda x, w, _, g=geometry: F.conv2d(x, w, None, *g), x, masked, None)
        check((y, x_grad, w_grad), (ey, ex, ew.where(mask, 0)))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert w_grad.stride() == mask.stride()
        assert len(looks) == [1, 1, 2, 2, 3][index]


def test_a_geometry_in_floats_is_refused(random_mask):
    mask = random_mask((6, 5, 3, 3), 0.6)
    weight, x = nn.Parameter(torch.randn(mask.shape)), torch.randn(2, 5, 8, 8)
    conv2d(x, weight, mask, None, (1, 1), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="expected stride to be one int"):
        conv2d(x, weight, mask, None, (1.0, 1.0), (1, 1), (1, 1))


def test_a_call_by_the_op_takes_its_place(random_mask, looks):
    mask = random_mask((64, 64), 0.6)
    x, weight, _ = operands(mask, (64, 64))
    sites = [(call := find_call("linear", "forward", x, weight, mask)).site, *call.partners.values()]
    with plan.use("measured"):
        plan.clear()
        for site in sites:
            site.choose(layout_of(mask).bucket, "dense")
        for _ in range(64):
            linear(x, weight, mask)
        assert len(looks) == 2  # the first, and the 64th, which takes the op
        assert known_layout(mask).settled.by_op
        linear(x, weight, mask)
        assert not known_layout(mask).settled.by_op
        plan.clear()


def test_what_is_remembered_goes_with_the_mask(random_mask):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    linear(x, weight, mask, bias).sum().backward()
    gone = [weakref.ref(each) for each in (known_layout(mask), weight, bias)]
    gc.disable()
    try:
        del mask, weight, bias
        assert [ref() for ref in gone] == [None] * 3  # without the help of the collector
    finally:
        gc.enable()


def test_operands_can_be_swapped(random_mask):
    mask = random_mask((17, 33), 0.6)
    x, weight, bias = operands(mask)
    doubled = nn.Parameter(2 * weight.detach())
    with torch.no_grad():
        linear(x, weight, mask, bias)
        wanted = linear(x, doubled, mask, bias)
    torch.utils.swap_tensors(weight, doubled)
    torch.testing.assert_close(linear(x, weight, mask, bias), wanted)


def test_operands_stay_as_they_were(random_mask):
    """Copied and saved, they take nothing along."""
    mask = random_mask((17, 33), 0.6)
    tensors = operands(mask)
    for _ in range(2):
        linear(tensors[0], tensors[1], mask, tensors[2]).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tensor in (*tensors, mask):
            assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
            assert torch.equal(copy.deepcopy(tensor), tensor)
            assert tensor._backward_hooks is None
