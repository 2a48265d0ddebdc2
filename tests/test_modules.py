import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import granet
from granet.methods import GraNet, Static
from granet.modules import SparseConv2d, SparseLinear
from granet_kernels.layout import layout_of, through_dispatcher

CONVS = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "bias": False},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "grouped": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": (3, 2), "groups": 4},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    "replicate-same": {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
}


def bind(layer, density=0.4, dense=False):
    mask = torch.rand_like(layer.weight, dtype=torch.float32) < density
    layer.bind(mask, torch.tensor(dense))
    return mask


def test_compiled_code_need_not_compare_masks(monkeypatch):
    layer = SparseLinear(5, 3)
    bind(layer)
    monkeypatch.setattr(torch, "equal", None)
    for _ in range(2):
        with through_dispatcher():
            assert layout_of(layer.mask) is layout_of(layer.mask)
        layer.type(torch.float64)


@pytest.mark.parametrize(("layer", "shape"), [(SparseLinear(5, 3), (2, 5)), (SparseConv2d(5, 3, 1), (2, 5, 4, 4))])
def test_a_replica_on_another_device_finds_its_mask(layer, shape):
    bind(layer)
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight.to("meta"), layer.bias.to("meta")
    assert replica(torch.empty(shape, device="meta")).shape == layer(torch.randn(shape)).shape


def results(layer, x):
    """Output and gradients of one pass."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("settings", CONVS.values(), ids=CONVS)
def test_a_conv_equals_torch_s_with_a_masked_weight(settings):
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 8, **settings).double()
    sparse = SparseConv2d(4, 8, **settings).double()
    sparse.load_state_dict(dense.state_dict())
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(results(sparse, x), results(dense, x))
    mask = bind(sparse)
    with torch.no_grad():
        dense.weight.masked_fill_(~mask, 0)
    expected = results(dense, x)
    expected[2] = expected[2].masked_fill(~mask, 0)
    torch.testing.assert_close(results(sparse, x), expected)
    assert sparse(x[0]).shape == dense(x[0]).shape


@pytest.mark.parametrize("shape", [(7,), (1, 7), (0, 7), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_equals_torch_s_with_a_masked_weight(shape, bias):
    torch.manual_seed(0)
    sparse = SparseLinear(7, 3, bias=bias)
    mask = bind(sparse)
    x = torch.randn(shape)
    torch.testing.assert_close(sparse(x), F.linear(x, sparse.weight.masked_fill(~mask, 0), sparse.bias))


def test_state_dict_keys_are_those_of_the_dense_model_and_load_both_ways():
    dense = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    sparse = granet.sparsify(copy.deepcopy(dense))
    assert list(sparse.state_dict()) == list(dense.state_dict())
    bind(sparse[0])
    assert list(sparse.state_dict()) == list(dense.state_dict())
    dense.load_state_dict(sparse.state_dict())
    sparse.load_state_dict(dense.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_it_does_for_torch_s_layers(dtype):
    torch.manual_seed(0)
    model = granet.sparsify(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)))
    dense = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    dense.load_state_dict(model.state_dict())
    for i in (0, 2):
        mask = bind(model[i])
        with torch.no_grad():
            dense[i].weight.masked_fill_(~mask, 0)
    x = torch.randn(2, 2, 4, 4)
    with torch.autocast("cpu", dtype=dtype):
        y, expected = model(x), dense(x)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected)
    y.float().sum().backward()
    expected.float().sum().backward()
    for i in (0, 2):
        assert model[i].weight.grad.dtype == torch.float32
        masked = dense[i].weight.grad.masked_fill(~model[i].mask, 0)
        torch.testing.assert_close(model[i].weight.grad, masked, rtol=2e-2, atol=1e-2)


def test_channels_last_stays_channels_last():
    layer = SparseConv2d(4, 8, 3, padding=1)
    bind(layer)
    layer = layer.to(memory_format=torch.channels_last)
    assert layer.mask.is_contiguous(memory_format=torch.channels_last)
    y = layer(torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_mask_follows_the_module_to_another_device_and_dtype():
    layer = SparseLinear(4, 3)
    bind(layer)
    layer.to(torch.float64)
    assert layer.mask.dtype == torch.bool
    assert layer(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    layer.to("meta")
    assert layer.mask.device.type == "meta"
    assert layer(torch.empty(2, 4, dtype=torch.float64, device="meta")).shape == (2, 3)


def sparse_training(steps=8):
    torch.manual_seed(0)
    model = granet.sparsify(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = GraNet(sparsity=0.8, initial_sparsity=0.5, update_every=2, total_steps=100)
    return model, optimizer, granet.Sparsifier(model, optimizer, method)


def one_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_ema_averages_the_weights_and_computes_with_all_of_them(use_buffers):
    model, optimizer, _ = sparse_training()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    expected = {}
    for step in range(8):
        one_step(model, optimizer)
        ema.update_parameters(model)
        for name, parameter in model.named_parameters():
            now = parameter.detach().clone()
            expected[name] = now if step == 0 else expected[name] * 0.5 + now * 0.5
    torch.testing.assert_close(dict(ema.module.named_parameters()), expected)
    x = torch.randn(4, 6)
    torch.testing.assert_close(ema.module[0](x), F.linear(x, expected["0.weight"], expected["0.bias"]))
    assert model[0].mask is not None
    assert ema.module[0].mask is None


def test_a_pickled_model_comes_back_unbound_with_the_same_output():
    model, optimizer, _ = sparse_training()
    one_step(model, optimizer)
    file = io.BytesIO()
    torch.save(model.eval(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(4, 6)
    torch.testing.assert_close(loaded(x), model(x))
    assert loaded[0].mask is None


def test_gradient_clipping_sees_a_gradient_that_is_zero_off_the_mask():
    model, optimizer, sparsifier = sparse_training()
    assert not sparsifier.needs_gradient
    model(torch.randn(5, 6)).square().mean().backward()
    for layer in sparsifier.layers:
        assert not layer.weight.grad[~layer.mask].any()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    optimizer.step()
    assert all(not layer.weight[~layer.mask].any() for layer in sparsifier.layers)


def test_double_backward_goes_through_bound_layers():
    layer = SparseLinear(4, 3).double()
    mask = bind(layer)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    w = layer.weight.detach().masked_fill(~mask, 0).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.linear(x2, w, layer.bias).square().sum(), x2, create_graph=True)
    expected.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, w.grad.masked_fill(~mask, 0))


@pytest.mark.parametrize("layer", [nn.Linear(8, 4), nn.Conv2d(2, 4, 2)], ids=["linear", "conv"])
def test_extra_repr_names_the_granularity(layer):
    sparse = granet.sparsify(layer, granularity="2:4")
    assert "granularity=2:4" in repr(sparse)


def test_a_removed_sparsifier_leaves_dense_layers_with_the_same_output():
    model, optimizer, sparsifier = sparse_training()
    one_step(model, optimizer)
    x = torch.randn(4, 6)
    before = model.eval()(x)
    sparsifier.remove()
    torch.testing.assert_close(model(x), before)
    assert type(model[0]) is SparseLinear
    assert model[0].mask is None
    step = sparsifier.step
    one_step(model.train(), optimizer)
    assert sparsifier.step == step
    granet.Sparsifier(model, optimizer, Static(sparsity=0.5, total_steps=1))
