from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from granet_kernels import conv2d

OPS = torch.ops.granet
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# name: (x shape, weight shape, stride, padding, dilation, groups)
GEOMETRIES = {
    "3x3": ((2, 5, 7, 6), (4, 5, 3, 3), 1, 1, 1, 1),
    "1x1": ((2, 5, 7, 6), (4, 5, 1, 1), 1, 0, 1, 1),
    "stride": ((2, 3, 13, 12), (4, 3, 3, 3), 2, 1, 1, 1),
    "uneven": ((1, 3, 9, 13), (2, 3, 2, 3), (2, 1), (0, 2), (1, 3), 1),
    "groups": ((2, 6, 8, 7), (4, 3, 3, 2), (1, 2), 1, 1, 2),
    "depthwise": ((2, 6, 7, 7), (6, 1, 3, 3), 1, 1, 1, 6),
    "depthwise-doubled": ((2, 3, 7, 7), (6, 1, 3, 3), 2, 1, 2, 3),
    "same": ((2, 3, 7, 6), (4, 3, 3, 5), 1, "same", 1, 1),
    "same-even-kernel": ((2, 3, 7, 6), (4, 3, 2, 4), 1, "same", (1, 3), 1),
    "valid": ((2, 3, 7, 6), (4, 3, 3, 5), (2,), "valid", [1], 1),
    "one-channel": ((2, 1, 7, 6), (1, 1, 3, 3), 1, 1, 1, 1),
    "one-pixel": ((3, 4, 1, 1), (5, 4, 3, 3), 1, 1, 1, 1),
    "empty-batch": ((0, 3, 7, 6), (4, 3, 3, 3), 1, 1, 1, 1),
    "unbatched": ((3, 7, 6), (4, 3, 3, 3), 1, 1, 1, 1),
    "unbatched-same": ((3, 7, 6), (4, 3, 2, 2), 1, "same", 1, 1),
}
# What the ops themselves take: images of four dimensions and pairs.
OP_GEOMETRIES = {
    name: (x, w, *([g, g] if isinstance(g, int) else g for g in pairs), groups)
    for name, (x, w, *pairs, groups) in GEOMETRIES.items()
    if len(x) == 4 and "same" not in pairs and "valid" not in pairs
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def gradients(function, x, weight, bias, cotangent):
    """(y, x gradient, weight gradient, bias gradient) of function(x, weight, bias)."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, cotangent)


def test_hand_worked():
    x = torch.arange(1.0, 10.0).reshape(1, 1, 3, 3).requires_grad_()
    weight = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]], requires_grad=True)
    mask = torch.tensor([[[[True, False], [False, True]]]])
    bias = torch.tensor([0.5], requires_grad=True)

    y = conv2d(x, weight, mask, bias)
    y.backward(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))

    assert y.tolist() == [[[[5001.5, 6002.5], [8004.5, 9005.5]]]]
    assert x.grad.tolist() == [[[[1.0, 2.0, 0.0], [3.0, 1004.0, 2000.0], [0.0, 3000.0, 4000.0]]]]
    assert weight.grad.tolist() == [[[[1 + 4 + 12 + 20, 0.0], [0.0, 5 + 12 + 24 + 36]]]]
    assert bias.grad.tolist() == [10.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("density", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_as_accurate_as_masked_dense(geometry, density, dtype, random_mask, assert_as_accurate):
    x_shape, w_shape, *rest = geometry
    mask = random_mask(w_shape, density)

    def dense(x, weight, bias):
        return F.conv2d(x, weight * mask, bias, *rest)

    operands = [torch.randn(shape).to(dtype) for shape in (x_shape, w_shape, w_shape[:1])]
    operands.append(torch.randn_like(dense(*operands)))
    actual = gradients(lambda x, w, b: conv2d(x, w, mask, b, *rest), *operands)
    torchs = gradients(dense, *operands)
    exact = gradients(dense, *[t.double() for t in operands])

    for three in zip(actual, torchs, exact, strict=True):
        assert_as_accurate(*three)
    assert actual[2][~mask].count_nonzero() == 0


@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=["w-nchw", "w-nhwc"])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last], ids=["x-nchw", "x-nhwc"])
@pytest.mark.parametrize("name", ["3x3", "1x1", "stride", "groups", "depthwise", "same", "same-even-kernel"])
def test_memory_format_as_in_torch(name, x_format, weight_format, random_mask):
    x_shape, w_shape, *rest = GEOMETRIES[name]
    x = torch.randn(x_shape).contiguous(memory_format=x_format)
    weight = torch.randn(w_shape).contiguous(memory_format=weight_format)
    mask = random_mask(w_shape, 0.5).contiguous(memory_format=weight_format)
    bias = torch.randn(w_shape[0])
    cotangent = torch.randn_like(F.conv2d(x, weight, bias, *rest))

    actual = gradients(lambda x, w, b: conv2d(x, w, mask, b, *rest), x, weight, bias, cotangent)
    torchs = gradients(lambda x, w, b: F.conv2d(x, w, b, *rest), x, weight, bias, cotangent)

    assert actual[0].stride() == torchs[0].stride()
    assert actual[1].stride() == torchs[1].stride()
    assert actual[2].stride() == weight.stride()


def test_strided_operands(random_mask):
    x = torch.randn(2, 7, 8, 6).permute(0, 3, 1, 2)[:, ::2, 1:]
    weight = torch.randn(3, 3, 4, 3).permute(2, 3, 0, 1)
    mask = random_mask((3, 3, 4, 3), 0.5).permute(2, 3, 0, 1)
    operands = x, weight, torch.randn(8)[::2], torch.randn(1, 1, 1, 1).expand(2, 4, 4, 6)
    actual = gradients(lambda x, w, b: conv2d(x, w, mask, b), *operands)
    expected = gradients(lambda x, w, b: F.conv2d(x, w * mask, b), *operands)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_nothing_off_the_mask_matters():
    weight = torch.tensor([[[[2.0, float("nan")], [float("inf"), 3.0]]]], requires_grad=True)
    mask = torch.eye(2, dtype=torch.bool)[None, None]
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    y = conv2d(x, weight, mask)
    y.sum().backward()
    assert y.tolist() == [[[[5.0]]]]
    assert x.grad.tolist() == [[[[2.0, 0.0], [0.0, 3.0]]]]
    assert weight.grad.tolist() == [[[[1.0, 0.0], [0.0, 1.0]]]]


@pytest.mark.parametrize(("forward", "backward"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("name", ["3x3", "groups", "same-even-kernel", "unbatched"])
def test_flag_counts_when_backward_runs(name, forward, backward, random_mask):
    x_shape, w_shape, *rest = GEOMETRIES[name]
    x, weight, mask = torch.randn(x_shape), torch.randn(w_shape, requires_grad=True), random_mask(w_shape, 0.3)
    flag = torch.tensor(forward)
    y = conv2d(x, weight, mask, None, *rest, dense_wgrad=flag)
    flag.fill_(backward)
    y.sum().backward()
    (expected,) = torch.autograd.grad(F.conv2d(x, weight, None, *rest).sum(), weight)
    torch.testing.assert_close(weight.grad, expected if backward else expected * mask)


@pytest.mark.parametrize("needed", [*itertools.product([False, True], repeat=3)][1:], ids=str)
def test_backward_runs_only_what_is_needed(needed, random_mask, recorded_ops):
    shapes = [(2, 5, 7, 6), (4, 5, 3, 3), (4,)]
    x, weight, bias = operands = [torch.randn(s).requires_grad_(r) for s, r in zip(shapes, needed, strict=True)]
    y = conv2d(x, weight, random_mask((4, 5, 3, 3), 0.5), bias)
    with recorded_ops() as record:
        torch.autograd.grad(y, [t for t in operands if t.requires_grad], torch.ones_like(y))
    names = ["granet.conv2d_dgrad", "granet.conv2d_wgrad", "aten.sum.dim_IntList"]
    assert [name for name in record.names if name != "aten.ones_like"] == list(itertools.compress(names, needed))


@pytest.mark.parametrize("name", ["uneven", "depthwise-doubled", "same-even-kernel", "unbatched", "empty-batch"])
def test_gradcheck_twice(name, random_mask):
    x_shape, w_shape, *rest = GEOMETRIES[name]
    mask = random_mask(w_shape, 0.5)
    shapes = ((*x_shape[:-2], 6, 7) if name == "uneven" else x_shape, w_shape, w_shape[:1])
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(x, weight, bias):
        return conv2d(x, weight, mask, bias, *rest)

    assert torch.autograd.gradcheck(function, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, operands, fast_mode=True)


@pytest.mark.parametrize("dense", [None, False, True])
def test_gradient_penalty(dense, random_mask):
    """A second-order term also delivers the dense gradient while the flag is true, as if W were the parameter."""
    x_shape, w_shape, *rest = GEOMETRIES["groups"]
    mask = random_mask(w_shape, 0.5)
    flag = None if dense is None else torch.tensor(dense)
    start = [torch.randn(shape, dtype=torch.float64) for shape in (x_shape, w_shape)]

    def straight_through(x, weight):
        return F.conv2d(x, weight + (weight * mask - weight).detach() if dense else weight * mask, None, *rest)

    def penalty_gradient(function):
        x, weight = (t.clone().requires_grad_() for t in start)
        first = torch.autograd.grad(function(x, weight).tanh().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    actual = penalty_gradient(lambda x, weight: conv2d(x, weight, mask, None, *rest, dense_wgrad=flag))
    for a, e in zip(actual, penalty_gradient(straight_through), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("geometry", OP_GEOMETRIES.values(), ids=OP_GEOMETRIES.keys())
def test_opcheck(geometry, random_mask):
    x_shape, w_shape, *rest = geometry
    x = torch.randn(x_shape, requires_grad=True)
    weight = torch.randn(w_shape, requires_grad=True)
    mask, bias = random_mask(w_shape, 0.5), torch.randn(w_shape[0], requires_grad=True)
    grad = torch.randn_like(F.conv2d(x, weight, bias, *rest)).requires_grad_()
    torch.library.opcheck(OPS.conv2d.default, (x, weight, mask, bias, *rest, None))
    torch.library.opcheck(OPS.conv2d_dgrad.default, (grad, weight, mask, x_shape, *rest, torch.tensor(False)))
    torch.library.opcheck(OPS.conv2d_wgrad.default, (grad, x, mask, *rest, torch.tensor(True)))


@pytest.mark.parametrize("name", ["1x1", "stride", "depthwise", "one-channel", "one-pixel"])
def test_opcheck_channels_last(name, random_mask):
    x_shape, w_shape, *rest = OP_GEOMETRIES[name]
    x, weight, mask = (
        t.contiguous(memory_format=torch.channels_last)
        for t in (torch.randn(x_shape), torch.randn(w_shape), random_mask(w_shape, 0.5))
    )
    grad = torch.randn_like(F.conv2d(x, weight, None, *rest))
    torch.library.opcheck(OPS.conv2d.default, (x.requires_grad_(), weight, mask, None, *rest, None))
    torch.library.opcheck(OPS.conv2d_dgrad.default, (grad, weight, mask, x_shape, *rest, None))
    torch.library.opcheck(OPS.conv2d_wgrad.default, (grad, x.detach(), mask, *rest, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_opcheck_dtypes_and_strides(dtype, random_mask):
    x = torch.randn(2, 7, 8, 6).to(dtype).permute(0, 3, 1, 2)[:, ::2, 1:].requires_grad_()
    weight = torch.randn(3, 3, 4, 3).to(dtype).permute(2, 3, 0, 1).requires_grad_()
    mask = random_mask((4, 3, 3, 3), 0.5).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(1, 1, 1, 1).to(dtype).expand(2, 4, 4, 6).requires_grad_()
    rest = [1, 1], [0, 0], [1, 1], 1
    torch.library.opcheck(OPS.conv2d.default, (x, weight, mask, None, *rest, None))
    torch.library.opcheck(OPS.conv2d_dgrad.default, (grad, weight, mask, x.shape, *rest, None))
    torch.library.opcheck(OPS.conv2d_wgrad.default, (grad, x, mask, *rest, None))


@pytest.mark.parametrize("name", ["3x3", "depthwise", "same-even-kernel", "unbatched"])
def test_compiled_once_for_all_masks_and_flags(name, random_mask, compiled_once):
    x_shape, w_shape, *rest = GEOMETRIES[name]
    flag, mask = torch.tensor(False), random_mask(w_shape, 0.5)
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in (x_shape, w_shape, w_shape[:1]))

    def step(x, weight, bias, mask, flag):
        return conv2d(x, weight, mask, bias, *rest, dense_wgrad=flag).square().sum()

    compiled = compiled_once(step)
    for i in range(10):
        mask.copy_(random_mask(w_shape, i / 10))
        flag.fill_(i % 3 == 0)
        actual = torch.autograd.grad(compiled(x, weight, bias, mask, flag), (x, weight, bias))
        expected = torch.autograd.grad(step(x, weight, bias, mask, flag), (x, weight, bias))
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("name", ["3x3", "1x1", "stride", "uneven", "same", "unbatched"])
def test_flops_are_the_dense_ones(name, random_mask):
    x_shape, w_shape, *rest = GEOMETRIES[name]

    def count(function):
        x, weight = torch.randn(x_shape, requires_grad=True), torch.randn(w_shape, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            function(x, weight, *rest).sum().backward()
        return counter.get_total_flops()

    batched = x_shape if len(x_shape) == 4 else (1, *x_shape)
    y_shape = F.conv2d(torch.empty(batched), torch.empty(w_shape), None, *rest).shape
    macs = y_shape[0] * y_shape[2:].numel() * torch.Size(w_shape).numel()
    ours = count(lambda x, w, *rest: conv2d(x, w, random_mask(w_shape, 0.5), None, *rest))
    assert ours == 3 * 2 * macs
    if len(x_shape) == 4:
        assert ours == count(lambda x, w, *rest: F.conv2d(x, w, None, *rest))


BAD = {
    "weight 3-D": (
        {"weight": torch.ones(4, 3, 3), "mask": torch.ones(4, 3, 3).bool()},
        "expected weight of shape .out",
    ),
    "weight dtype": (
        {"weight": torch.ones(4, 3, 3, 3, dtype=torch.int8)},
        "expected weight of dtype .* got torch.int8",
    ),
    "x dtype": ({"x": torch.ones(2, 3, 5, 5).half()}, "expected x of dtype torch.float32, got torch.float16"),
    "x device": ({"x": torch.ones(2, 3, 5, 5, device="meta")}, "expected x on device cpu, got one on meta"),
    "x channels": ({"x": torch.ones(2, 4, 5, 5)}, r"x of shape \(n, 3, h, w\) .* got shape \(2, 4, 5, 5\)"),
    "x 2-D": ({"x": torch.ones(3, 5)}, r"x of shape \(n, 3, h, w\) .* got shape \(3, 5\)"),
    "x small": (
        {"x": torch.ones(2, 3, 5, 2)},
        r"at least as large as the dilated kernel, got x of shape \(2, 3, 5, 2\)",
    ),
    "mask dtype": ({"mask": torch.ones(4, 3, 3, 3).byte()}, "expected mask of dtype torch.bool, got torch.uint8"),
    "mask shape": ({"mask": torch.ones(4, 3).bool()}, r"mask of the weight's shape \(4, 3, 3, 3\), got shape \(4, 3\)"),
    "bias shape": ({"bias": torch.ones(3)}, r"expected bias of shape \(4,\), got shape \(3,\)"),
    "flag": ({"dense_wgrad": 1}, "expected dense_wgrad .* got 1"),
    "stride 0": ({"stride": 0}, "expected stride to be one int >= 1 or two, got 0"),
    "stride triple": ({"stride": (1, 1, 1)}, r"expected stride to be one int >= 1 or two, got \(1, 1, 1\)"),
    "padding negative": (
        {"padding": (0, -1)},
        r'padding to be one int >= 0 or two or "same" or "valid", got \(0, -1\)',
    ),
    "padding name": ({"padding": "full"}, 'padding to be .* or "same" or "valid", got \'full\''),
    "padding same": ({"padding": "same", "stride": 2}, 'expected stride 1 with padding "same", got .2, 2'),
    "dilation": ({"dilation": 0.5}, "expected dilation to be one int >= 1 or two, got 0.5"),
    "groups 0": ({"groups": 0}, "expected groups to divide the 4 output channels, got 0"),
    "groups 3": ({"groups": 3}, "expected groups to divide the 4 output channels, got 3"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(change, message):
    good = {"x": torch.ones(2, 3, 5, 5), "weight": torch.ones(4, 3, 3, 3), "mask": torch.ones(4, 3, 3, 3).bool()}
    with pytest.raises(ValueError, match=f"conv2d: .*{message}"):
        conv2d(**{**good, **change})
