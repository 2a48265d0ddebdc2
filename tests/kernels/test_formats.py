"""Dense convolutions of NCHW images by way of channels_last: the same results, and the way that is faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import ISAS

from granet_kernels import conv2d, plan, plan_budget
from granet_kernels.cpu_backend import calls, formats, library
from granet_kernels.cpu_backend.calls import find_call
from granet_kernels.plan import Plan
from granet_kernels.plan_times import Turns

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))

IMAGES = [(1, 1, 1, 1), (3, 7, 5, 1), (2, 16, 4, 4), (1, 300, 1, 1), (2, 63, 9, 7), (5, 17, 16, 16), (3, 100, 3, 3)]
IMAGES += [(0, 16, 3, 3), (2, 1, 5, 5), (70, 64, 32, 32)]
# name: (x shape, weight shape, stride, padding, dilation)
GEOMETRIES = {
    "3x3": ((5, 17, 9, 8), (24, 17, 3, 3), (1, 1), (1, 1), (1, 1)),
    "1x1": ((3, 32, 6, 5), (16, 32, 1, 1), (1, 1), (0, 0), (1, 1)),
    "stride": ((4, 16, 13, 12), (33, 16, 3, 3), (2, 2), (1, 1), (1, 1)),
    "dilation": ((3, 20, 11, 10), (18, 20, 3, 3), (1, 1), (2, 2), (2, 2)),
    "uneven": ((2, 19, 9, 13), (16, 19, 2, 3), (2, 1), (0, 2), (1, 3)),
    "kernel-as-image": ((7, 16, 3, 3), (19, 16, 3, 3), (1, 1), (0, 0), (1, 1)),
    "one-image": ((1, 16, 7, 7), (18, 16, 5, 5), (1, 1), (2, 2), (1, 1)),
}
GRADIENTS = {
    "contiguous": torch.clone,
    "channels-last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "expanded": lambda g: g[:1, :1, :1, :1].expand_as(g),
}


@pytest.fixture(autouse=True)
def _densely():
    with plan.use("dense"):
        yield


@pytest.fixture
def converting(monkeypatch):
    """Every dense convolution that may goes through channels_last. A list of the shapes of what is converted."""
    converted = []
    convert = formats.to_channels_last

    def to_channels_last(images):
        converted.append(images.shape)
        return convert(images)

    monkeypatch.setattr(formats, "to_channels_last", to_channels_last)
    monkeypatch.setattr(plan, "take_turns", lambda turns: (True, False))
    monkeypatch.setattr(formats, "_may_convert", lambda call: call.is_nchw)
    return converted


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_formats_are_changed_exactly(shape, isa, threads, isa_used, monkeypatch):
    monkeypatch.setattr(library, "threads", lambda: threads)
    x = torch.randn(shape)
    x[torch.rand(shape) < 0.1] = torch.nan
    with isa_used(isa):
        there = formats.to_channels_last(x)
        back = formats.to_nchw(there)
    assert there.is_contiguous(memory_format=torch.channels_last)
    assert back.is_contiguous()
    assert torch.equal(there.view(torch.int32), x.view(torch.int32))
    assert torch.equal(back.view(torch.int32), x.view(torch.int32))


def operands(random_mask, name, density):
    x_shape, w_shape, *geometry = GEOMETRIES[name]
    mask = random_mask(w_shape, density)
    tensors = [torch.randn(shape, requires_grad=True) for shape in (x_shape, w_shape, w_shape[:1])]
    grad = torch.randn(F.conv2d(*tensors, *geometry).shape)
    return *tensors, mask, grad, geometry


def results(x, weight, bias, mask, grad, geometry, dtype=torch.float32):
    """Output and gradients of torch's convolution with a masked weight."""
    x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in (x, weight, bias))
    y = F.conv2d(x, weight.where(mask, 0), bias, *geometry)
    return y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad.to(dtype))


@pytest.mark.parametrize("layout", GRADIENTS)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("large", [False, True], ids=["plain", "ops"])
def test_the_results_are_those_of_torch(
    large, name, density, layout, random_mask, assert_as_accurate, converting, monkeypatch
):
    if large:  # a large masked layer is one for the ops
        monkeypatch.setattr("granet_kernels.plain._weight", lambda *_: None)
    x, weight, bias, mask, grad, geometry = operands(random_mask, name, density)
    grad = GRADIENTS[layout](grad)
    y = conv2d(x, weight, mask, bias, *geometry)
    got = y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)
    assert x.shape in converting
    assert (grad.shape in converting) == grad.is_contiguous()
    exact = results(x, weight, bias, mask, grad, geometry, torch.float64)
    for a, b, c in zip(got, results(x, weight, bias, mask, grad, geometry), exact, strict=True):
        assert_as_accurate(a, b, c)
    assert got[0].stride() == exact[0].stride()
    assert got[2].stride() == weight.stride()
    if grad.is_contiguous():
        assert got[1].stride() == x.stride()
    assert got[2][~mask].count_nonzero() == 0


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=str)
def test_only_the_gradients_that_are_needed_are_computed(needed, random_mask, converting):
    x, weight, bias, mask, grad, geometry = operands(random_mask, "3x3", 0.5)
    expected = results(x, weight, bias, mask, grad, geometry)[1:3]
    x.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    conv2d(x, weight, mask, None, *geometry).backward(grad)
    for tensor, wanted, reference in zip((x, weight), needed, expected, strict=True):
        assert (tensor.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(tensor.grad, reference, rtol=1e-4, atol=1e-4)
    assert converting.count(x.shape) == 1 + needed[1]  # forward; and what the gradient of the weight reads
    assert converting.count(weight.shape) == 1 + needed[0]


def test_a_bias_needs_no_convolution(random_mask, converting):
    x, weight, bias, mask, grad, geometry = operands(random_mask, "3x3", 1.0)
    conv2d(x.detach(), weight.detach(), mask, bias, *geometry).backward(grad)
    torch.testing.assert_close(bias.grad, grad.sum((0, 2, 3)))
    assert grad.shape not in converting


LAST = {"memory_format": torch.channels_last}
SAVED = {
    "channels-last": (lambda t: t.detach(), lambda t: t.contiguous(**LAST)),
    "float64": (lambda t: t.double(), lambda t: t),
    "bfloat16": (lambda t: t.bfloat16(), lambda t: t),
    "negative": (lambda t: t.detach(), lambda t: torch._neg_view(-t) if t.is_floating_point() else t),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_tensors_may_come_back_otherwise(name, random_mask, converting):
    x, weight, bias, mask, grad, geometry = operands(random_mask, "3x3", 1.0)
    expected = results(x, weight, bias, mask, grad, geometry)[1:3]
    with torch.autograd.graph.saved_tensors_hooks(*SAVED[name]):
        y = conv2d(x, weight, mask, bias, *geometry)
    if name in ("float64", "bfloat16"):  # torch refuses them, too
        with pytest.raises(RuntimeError):
            torch.autograd.grad(y, (x, weight), grad)
        return
    for got, wanted in zip(torch.autograd.grad(y, (x, weight), grad), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_a_weight_may_change_its_format_before_the_backward_pass(random_mask, converting):
    x, weight, bias, mask, grad, geometry = operands(random_mask, "3x3", 1.0)
    expected = results(x, weight, bias, mask, grad, geometry)[1:3]
    y = conv2d(x, weight, mask, bias, *geometry)
    weight.data = weight.data.contiguous(**LAST)
    for got, wanted in zip(torch.autograd.grad(y, (x, weight), grad), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_negated_views(random_mask, converting):
    x, weight, bias, mask, _, geometry = operands(random_mask, "3x3", 0.5)
    for mode in ("dense", "native"):
        with plan.use(mode):
            got = conv2d(torch._neg_view(x.detach()), weight, mask, bias, *geometry)
        expected = F.conv2d(-x, weight.where(mask, 0), bias, *geometry)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_full_gradient_of_an_update(random_mask, converting, monkeypatch):
    x, weight, bias, mask, grad, geometry = operands(random_mask, "3x3", 0.5)
    _, _, full, _ = results(x, weight.where(mask, 0), bias, torch.ones_like(mask), grad, geometry)
    for op in (False, True):
        if op:
            monkeypatch.setattr("granet_kernels.plain._weight", lambda *_: None)
        y = conv2d(x, weight, mask, bias, *geometry, dense_wgrad=torch.tensor(True))
        (got,) = torch.autograd.grad(y, weight, grad)
        torch.testing.assert_close(got, full, rtol=1e-4, atol=1e-4)


def test_derivatives_of_gradients(random_mask, converting):
    x, weight, bias, mask, grad, geometry = operands(random_mask, "stride", 0.5)

    def penalty(layer):
        y = layer()
        gradients = torch.autograd.grad(y, (x, weight), grad, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, weight))

    got = penalty(lambda: conv2d(x, weight, mask, bias, *geometry))
    expected = penalty(lambda: F.conv2d(x, weight.where(mask, 0), bias, *geometry))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)


def test_batches_of_gradients(random_mask, converting):
    x, weight, bias, _, grad, geometry = operands(random_mask, "3x3", 1.0)
    mask = torch.ones_like(weight, dtype=torch.bool)
    grads = torch.stack([grad, 2 * grad])
    y = conv2d(x, weight, mask, bias, *geometry)
    got = torch.autograd.grad(y, (x, weight, bias), grads, is_grads_batched=True)
    expected = results(x, weight, bias, mask, grad, geometry)[1:]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, torch.stack([b, 2 * b]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_one_pixel_may_be_changed_in_place(density, random_mask, converting):
    """As LeNet's last convolution has it, with nn.ReLU(inplace=True) behind."""
    mask = random_mask((24, 16, 5, 5), density)
    x, weight = torch.randn(6, 16, 5, 5), torch.randn(mask.shape, requires_grad=True)
    y = torch.relu_(conv2d(x, weight, mask))
    torch.testing.assert_close(y, F.conv2d(x, weight.where(mask, 0)).relu(), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert converting


def test_an_input_that_was_changed_is_refused(random_mask, converting):
    x, weight, bias, mask, grad, geometry = operands(random_mask, "3x3", 1.0)
    images = x.detach().clone()
    y = conv2d(images, weight, mask, bias, *geometry)
    images.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


def call_of(x_shape, w_shape, memory_format=torch.contiguous_format, dtype=torch.float32):
    x = torch.empty(x_shape, dtype=dtype).contiguous(memory_format=memory_format)
    weight = torch.empty(w_shape, dtype=dtype)
    return find_call("conv2d", "forward", x, weight, torch.empty(w_shape, dtype=torch.bool), None, padding=(1, 1))


def test_which_layers_may_go_through_channels_last():
    assert call_of((2, 16, 8, 8), (16, 16, 3, 3)).is_nchw
    assert not call_of((2, 16, 8, 8), (16, 16, 3, 3), torch.channels_last).is_nchw
    assert not call_of((2, 3, 8, 8), (64, 3, 3, 3)).is_nchw  # few channels are transposed slowly
    assert not call_of((2, 16, 1, 1), (16, 16, 3, 3)).is_nchw  # lies the same way in both
    assert call_of((128, 16, 32, 32), (16, 16, 3, 3)).is_large
    assert not call_of((16, 16, 32, 32), (16, 16, 3, 3)).is_large


@pytest.fixture
def large_layers(monkeypatch):
    monkeypatch.setattr(calls, "_LARGE", 1)
    monkeypatch.setattr(calls, "_calls", {})
    plan.clear()
    yield
    plan.clear()


def converted_in(steps, operands, monkeypatch):
    """How many images each of so many steps converts there and back."""
    x, weight, bias, mask, grad, geometry = operands
    counts = []
    transpose = formats._transpose
    monkeypatch.setattr(formats, "_transpose", lambda *args: (counts.append(1), transpose(*args))[1])
    numbers = []
    for _ in range(steps):
        counts.clear()
        conv2d(x, weight, mask, bias, *geometry).backward(grad)
        numbers.append(len(counts))
    return numbers


@pytest.mark.parametrize("density", [0.9, 1.0])
def test_the_rule_converts_large_layers(density, random_mask, large_layers, monkeypatch):
    given = operands(random_mask, "3x3", density)
    with plan.use("rule"):
        assert converted_in(2, given, monkeypatch) == [8, 8]  # x, weight, y; gradient, x, weight; of x, of weight
    with plan.use("dense"):
        assert converted_in(1, given, monkeypatch) == [0]


def test_measuring_comes_to_an_end(random_mask, large_layers, monkeypatch):
    monkeypatch.setattr(plan_budget, "_ALLOWANCE", 60.0)  # whatever else the machine does
    given = operands(random_mask, "3x3", 1.0)
    with plan.use("measured"):
        numbers = converted_in(40, given, monkeypatch)
        site = find_call("conv2d", "forward", *given[:2], given[3], given[2], *given[5]).site
        turns = site.turns.values()
        assert len(turns) == 2
        assert all(each.winner is not None for each in turns)
        assert numbers[-1] == sum(each.winner * amount for each, amount in zip(turns, (3, 5), strict=True))
        assert 0 < sum(numbers[:8]) < 8 * 8
        plan.clear()
        assert site.turns == {}


@pytest.mark.parametrize("large", [False, True])
def test_what_measures_nothing_converts_what_is_large(large):
    for mode, way in (("rule", large), ("native", large), ("dense", False)):
        assert Plan(float, mode, None).take_turns(Turns(large)) == (way, False)


class Race:
    """Two ways that take given seconds, chosen between by a measured plan."""

    def __init__(self, seconds, favourite):
        self.now, self.seconds, self.turns = 100.0, seconds, Turns(favourite)
        self.plan = Plan(lambda: self.now, "measured", None)

    def run(self, calls):
        ways = []
        for _ in range(calls):
            way, timed = self.plan.take_turns(self.turns)
            self.now += self.seconds[way]
            if timed:
                self.plan.record_turn(self.turns, way, self.seconds[way])
            ways.append(way)
        return ways


@pytest.mark.parametrize("favourite", [False, True])
@pytest.mark.parametrize(("plain", "converted", "winner"), [(3e-3, 2e-3, True), (2e-3, 3e-3, False)])
def test_the_faster_way_wins(plain, converted, winner, favourite):
    race = Race({False: plain, True: converted}, favourite)
    ways = race.run(100)
    assert race.turns.winner is winner
    assert ways[0] is favourite
    assert ways[:8].count(True) == 4
    assert set(ways[8:]) == {winner}


@pytest.mark.parametrize("favourite", [False, True])
def test_a_small_advantage_does_not_count(favourite):
    race = Race({favourite: 1e-3, not favourite: 0.96e-3}, favourite)
    race.run(20)
    assert race.turns.winner is favourite


def test_a_hopeless_way_is_tried_three_times():
    race = Race({False: 1e-3, True: 3e-3}, False)
    assert race.run(50).count(True) == 3
    assert race.turns.winner is False


def test_one_slow_sample_is_not_the_end():
    race = Race({False: 2e-3, True: 1e-3}, False)
    race.run(3)
    race.seconds[True] = 5e-3
    race.run(1)
    race.seconds[True] = 1e-3
    race.run(50)
    assert race.turns.winner is True


def test_shapes_that_come_and_go_stay_within_the_budget():
    race = Race({False: 0.010, True: 0.019}, False)
    ways = []
    for _ in range(2000):
        race.turns = Turns(False)
        ways += race.run(4)
    lost = 0.009 * ways.count(True)
    assert 0 < lost < (0.2 + 0.02 * (race.now - 100)) / 4 + 0.01  # the rest is for native code
    assert race.plan.summary().seconds == pytest.approx(lost)


def test_finding_out_stays_within_the_budget():
    race = Race({False: 1.0, True: 1.6}, False)
    ways = race.run(800)
    share = race.plan.summary().share
    assert 0 < share < 0.02
    assert race.turns.winner is False
    assert ways.count(True) == 4
