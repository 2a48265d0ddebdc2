"""Batch norms of sparsified models: torch's results, gradients and running statistics, whatever runs them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import granet
from granet import native, norms
from granet.models import create_model
from granet_kernels import plan
from granet_kernels.cpu_backend import library

needs_library = pytest.mark.skipif(library.unavailable() is not None, reason="no native library")


@pytest.fixture(autouse=True)
def _small_images_too(monkeypatch):
    monkeypatch.setattr(native, "LEAST_VALUES", 0)
    monkeypatch.setattr(native, "LEAST_CHANNELS", 0)


@pytest.fixture
def recorded(monkeypatch):
    """(channels, residual?, relu?) of every norm that is computed natively."""
    calls = []
    normalize = norms.BatchNorm2d.normalize

    def record(self, x, residual=None, relu=False):
        calls.append((x.shape[1], residual is not None, relu))
        return normalize(self, x, residual, relu)

    monkeypatch.setattr(norms.BatchNorm2d, "normalize", record)
    return calls


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3))


def spread(bn):
    """Statistics and affine parameters other than those of a fresh norm."""
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
            if tensor is not None:
                tensor.uniform_(0.5, 2)
    return bn


SETTINGS = {
    "default": {},
    "momentum": {"momentum": 0.3, "eps": 1e-2},
    "cumulative": {"momentum": None},
    "no-affine": {"affine": False},
    "no-statistics": {"track_running_stats": False},
}


FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
formats = pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)


@formats
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_norm_does_what_torchs_does(settings, layout):
    torch.manual_seed(0)
    plain = spread(nn.BatchNorm2d(5, **settings))
    own = norms.BatchNorm2d(5, **settings)
    own.load_state_dict(plain.state_dict())
    for training in (True, True, False, True):
        x = (torch.randn(4, 5, 3, 3) * 3 + 1).contiguous(memory_format=layout).requires_grad_()
        expected, actual = plain.train(training)(x), own.train(training)(x)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(x)
        torch.testing.assert_close(
            torch.autograd.grad(actual, [x, *own.parameters()], grad),
            torch.autograd.grad(expected, [x, *plain.parameters()], grad),
            rtol=1e-4,
            atol=1e-4,
        )
        assert own.state_dict().keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(own.state_dict()[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "error"), [((1, 5, 1, 1), ValueError), ((2, 5, 3), ValueError), ((2, 4, 3, 3), RuntimeError)], ids=str
)
def test_what_torch_refuses_is_refused_alike(shape, error):
    messages = []
    for bn in (nn.BatchNorm2d(5), norms.BatchNorm2d(5)):
        with pytest.raises(error) as raised:
            bn(torch.randn(shape))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@needs_library
def test_where_a_norm_is_native(recorded):
    bn, x = norms.BatchNorm2d(5), torch.randn(4, 5, 3, 3)
    bn(x)
    assert recorded == [(5, False, False)]
    bn(x.contiguous(memory_format=torch.channels_last))
    assert recorded == [(5, False, False)] * 2
    recorded.pop()
    bn(torch.cat([x, x], 1)[:, :5])
    bn.double()(x.double())
    bn.float().eval()(x)
    with plan.use("dense"):
        bn.train()(x)
    norms.BatchNorm2d(5, affine=False)(x)
    bn(nn.Parameter(x).as_subclass(type("Other", (torch.Tensor,), {})))
    assert len(recorded) == 1
    norms.BatchNorm2d(5, track_running_stats=False).eval()(x)
    assert len(recorded) == 2


@needs_library
def test_few_channels_in_channels_last_are_left_to_torch(monkeypatch, recorded):
    monkeypatch.setattr(native, "LEAST_CHANNELS", 16)
    for channels in (15, 16):
        x = torch.randn(4, channels, 3, 3)
        norms.BatchNorm2d(channels)(x)
        norms.BatchNorm2d(channels)(x.contiguous(memory_format=torch.channels_last))
    assert recorded == [(15, False, False), (16, False, False), (16, False, False)]


@needs_library
def test_small_images_are_left_to_torch(monkeypatch, recorded):
    monkeypatch.setattr(native, "LEAST_VALUES", 180)
    bn = norms.BatchNorm2d(5)
    bn(torch.randn(3, 5, 3, 3))
    assert recorded == []
    bn(torch.randn(4, 5, 3, 3))
    assert recorded == [(5, False, False)]


@pytest.mark.parametrize("bn", [norms.BatchNorm2d, nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_relu_is_the_relu_of_the_sum(residual, bn):
    x, bn = torch.randn(4, 5, 3, 3), bn(5)
    added = torch.randn_like(x) if residual else None
    expected = F.relu(copy.deepcopy(bn)(x) + (added if residual else 0))
    torch.testing.assert_close(norms.norm_relu(bn, x, added), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("added", [torch.randn(1, 5, 1, 1), torch.randn(4, 5, 3, 3).double()], ids=["shape", "dtype"])
def test_a_residual_unlike_x_is_added_as_torch_adds(added):
    x, bn = torch.randn(4, 5, 3, 3), norms.BatchNorm2d(5)
    torch.testing.assert_close(norms.norm_relu(bn, x, added), F.relu(copy.deepcopy(bn)(x) + added))


def loss_and_gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), [p.grad for p in model.parameters()]


MODELS = {"digits-cnn": 1, "resnet20": 3, "vgg19": 3, "resnet18": 3, "resnet50": 3}


@formats
@pytest.mark.parametrize(("name", "channels"), MODELS.items(), ids=MODELS)
def test_a_sparsified_model_computes_what_the_plain_one_does(name, channels, layout):
    """As in float64, but for the few values that rounding takes across a ReLU's zero: one is 1 % of some gradient."""
    torch.manual_seed(0)
    plain = create_model(name, in_channels=channels)
    half_on(plain)
    plain = plain.to(memory_format=layout)
    own = granet.sparsify(copy.deepcopy(plain))
    x = torch.randn(4, channels, 32, 32).contiguous(memory_format=layout)
    exact = loss_and_gradients(copy.deepcopy(plain).double(), x.double())
    for training in (True, False):
        expected, actual = (loss_and_gradients(model.train(training), x) for model in (plain, own))
        if training:
            assert (actual[0].double() - exact[0]).norm() <= 2e-4 * exact[0].norm()
            assert largest_error(actual[1], exact[1]) <= 0.03
        else:
            # The running statistics come from the step before, and the rest is torch's own.
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-3, atol=1e-3)
    for own_buffer, buffer in zip(own.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(own_buffer, buffer, rtol=1e-3, atol=1e-4)


def half_on(model):
    """Biases that leave few values near a ReLU's zero, where rounding decides whether a gradient passes."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data = torch.where(torch.rand_like(module.bias) < 0.5, 2.0, -2.0)


def largest_error(gradients, exact):
    """The largest error of a gradient, in norm; what is 0 but for rounding counts as a thousandth of all."""
    least = 1e-3 * torch.stack([e.norm() for e in exact]).norm()
    return max(float((g.double() - e).norm() / (e.norm() + least)) for g, e in zip(gradients, exact, strict=True))


@needs_library
@formats
def test_pairs_and_blocks_run_as_one_operation(recorded, layout):
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=layout)
    granet.sparsify(small())(x)
    assert recorded == [(8, False, True)]
    recorded.clear()
    granet.sparsify(create_model("resnet20"))(x)
    assert [call[1:] for call in recorded] == [(False, True), *[(False, True), (True, True)] * 9]
    recorded.clear()
    granet.sparsify(create_model("resnet50-cifar"))(x)
    first = [(False, True), (False, True), (False, False), (True, True)]  # the third is the shortcut's
    assert [call[1:] for call in recorded][:5] == [(False, False), *first]
    assert len(recorded) == 53


@needs_library
@pytest.mark.parametrize("where", ["norm", "norm-before", "norm-backward", "relu", "everywhere"])
def test_hooks_fire_as_before(where, recorded):
    model = granet.sparsify(small())
    model[2].inplace = False  # torch allows no other beside a backward hook
    registers = {
        "norm": model[1].register_forward_hook,
        "norm-before": model[1].register_forward_pre_hook,
        "norm-backward": model[1].register_full_backward_hook,
        "relu": model[2].register_forward_hook,
        "everywhere": nn.modules.module.register_module_forward_hook,
    }
    seen = []
    handle = registers[where](lambda module, *_: seen.append(type(module)))
    try:
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    finally:
        handle.remove()
    assert (nn.ReLU if where == "relu" else norms.BatchNorm2d) in seen
    assert (8, False, True) not in recorded


@needs_library
def test_an_activation_put_in_later_is_used(recorded):
    model = granet.sparsify(create_model("resnet18"))
    block = model.layer1[0]
    block.relu = nn.Identity()
    assert (block(torch.randn(2, 64, 4, 4)) < 0).any()
    assert all(not relu for _, _, relu in recorded)


def test_classes_change_and_nothing_else():
    model = create_model("resnet18")
    before, names, printed = dict(model.named_parameters()), list(model.state_dict()), repr(model)
    granet.sparsify(model)
    assert type(model.bn1) is norms.BatchNorm2d
    assert type(model.layer1) is nn.Sequential  # of blocks: no norm to put together with anything
    assert type(model.layer2[0].downsample) is norms.Sequential
    assert type(model.layer1[0]).__module__ == "granet.norm_blocks"
    assert all(p is before[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == names
    assert (
        repr(model)
        .replace("SparseConv2d", "Conv2d")
        .replace("SparseLinear", "Linear")
        .replace(", granularity=unstructured", "")
        == printed
    )
    assert granet.sparsify(model) is model  # again


def test_norms_can_be_left_alone():
    model = granet.sparsify(create_model("resnet18"), fuse=False)
    assert {type(m).__module__ for m in model.modules()} == {
        "granet.modules",
        *("torchvision.models.resnet", "torch.nn.modules.batchnorm", "torch.nn.modules.activation"),
        *("torch.nn.modules.container", "torch.nn.modules.pooling"),
    }


def test_subclasses_are_left_alone():
    class Norm(nn.BatchNorm2d):
        pass

    class Chain(nn.Sequential):
        pass

    model = granet.sparsify(Chain(nn.Conv2d(3, 3, 1), Norm(3), nn.ReLU()))
    assert type(model) is Chain
    assert type(model[1]) is Norm


def test_copies_and_saved_models_are_the_same_classes():
    model = granet.sparsify(create_model("resnet18"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(model)(x)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(copy.deepcopy(other)(x), expected)
    part = granet.sparsify(small())[:2]
    assert [type(m).__name__ for m in part] == ["SparseConv2d", "BatchNorm2d"]


def test_synchronised_norms_can_replace_them():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(granet.sparsify(small()))
    assert type(model[1]) is nn.SyncBatchNorm
    assert model.eval()(torch.randn(2, 3, 8, 8)).shape == (2, 4, 4, 4)


def test_functional_calls_and_transforms():
    model, plain, x = granet.sparsify(small()), small(), torch.randn(4, 3, 8, 8)
    tensors = {**dict(plain.named_parameters()), **dict(plain.named_buffers())}
    doubled = {name: t.detach().clone() * 2 for name, t in tensors.items()}
    actual, expected = (
        torch.func.functional_call(m, {n: t.clone() for n, t in doubled.items()}, (x,)) for m in (model, plain)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    model[1] = norms.BatchNorm2d(8, track_running_stats=False)  # torch.func lets no function change a buffer
    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().mean())(parameters)
    torch.testing.assert_close(list(gradients.values()), loss_and_gradients(model, x)[1], rtol=1e-4, atol=1e-5)


def test_traced_graphs_hold_the_norms_as_modules():
    traced = torch.fx.symbolic_trace(granet.sparsify(small())[1:3])
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["1", "2"]


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "vgg19"])
def test_compiled_without_a_break(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = granet.sparsify(create_model(name))
    x = torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(model)(x)
    with torch.no_grad():
        actual = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
