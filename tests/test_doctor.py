import copy

import pytest
import torch
from torch import nn

import granet
from granet import speed
from granet.doctor import examine
from granet.granularity import Unstructured
from granet.speed import break_even, measure_layers
from granet_kernels import plan
from granet_kernels.layout import layout_of


def test_resnet50_as_in_the_papers():
    found = examine("resnet50", num_classes=1000)
    assert sum(layer.weights for layer in found.layers) == 25_502_912
    assert found.macs == 4_089_184_256
    assert [layer.name for layer in found.layers if layer.erk == 1.0] == ["layer1.0.conv1"]
    assert found.flops_ratio["erk"] == pytest.approx(0.242, abs=1e-3)
    assert found.flops_ratio["uniform"] == pytest.approx(0.1, abs=1e-3)


def test_layers_that_do_not_fit_are_dense_and_say_why():
    found = examine("digits-cnn", granularity="block:64x64")
    reasons = {layer.name: layer.problem for layer in found.layers}
    assert "64 x 64" in str(next(iter(reasons.values())))
    assert all((layer.erk is None) == (layer.problem is not None) for layer in found.layers)


def test_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    examine("mlp")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "resnt50"}, "unknown model"),
        ({"model_name": "mlp", "sparsity": 1.0}, "sparsity"),
        ({"model_name": "mlp", "granularity": "blocks"}, "granularity"),
    ],
    ids=["model", "sparsity", "granularity"],
)
def test_bad_request_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        examine(**arguments)


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        ({1.0: 0.5, 0.1: 0.1}, 0.0),  # faster at every density
        ({1.0: 3.0, 0.5: 2.0, 0.1: 0.2}, 1 - (0.1 + 0.4 * 0.8 / 1.8)),  # crosses between two of them
        ({1.0: 3.0, 0.5: 1.75}, 1 - 0.2),  # crosses below them
        ({1.0: 3.0, 0.5: 2.5}, None),
        ({1.0: 2.0, 0.5: 2.0}, None),
        ({0.25: 0.5}, 0.5),
        ({0.25: 0.5, 0.28: 0.57}, 0.5),
        ({0.5: 0.25}, 0.0),
        ({0.5: 1.0}, None),
    ],
    ids=[
        "always",
        "between",
        "below",
        "never",
        "flat",
        "one density",
        "two of them",
        "one of them at which it always wins",
        "slower",
    ],
)
def test_the_sparsity_from_which_native_code_wins(native, expected):
    assert break_even(1.0, native) == (None if expected is None else pytest.approx(expected))


def test_layers_are_measured_on_request():
    seen: list[str] = []
    found = examine("digits-cnn", measure_batch=2, progress=seen.append)
    assert seen == [layer.name for layer in found.layers]
    assert found.speedup is not None
    assert found.speedup >= 1
    for layer in found.layers:
        assert layer.speed is not None
        assert set(layer.speed.implementation.split("/")) <= {"native", "dense"}
        assert layer.speed.speedup >= 1
        assert layer.speed.break_even is None or 0 <= layer.speed.break_even < 1
    assert examine("digits-cnn").layers[0].speed is None


def test_measuring_leaves_the_model_as_it_was():
    model = granet.sparsify(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)))
    before = copy.deepcopy(model.state_dict())
    speeds = measure_layers(model, (4, 4, 4), {"0": 0.5, "3": 0.1}, Unstructured(), 2)
    assert set(speeds) == {"0", "3"}
    assert (speeds["0"].implementation, speeds["0"].speedup, speeds["0"].break_even) == ("dense", 1.0, None)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (model[3].mask, model.training, plan.mode()) == (None, True, "native")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[3]._forward_pre_hooks


def test_a_batch_without_images_is_refused():
    with pytest.raises(ValueError, match="batch: expected 1 or more, got 0"):
        examine("mlp", measure_batch=0)


def test_dense_is_measured_in_both_memory_formats(monkeypatch):
    """The faster one counts, all directions together, and what is mixed with native code is in NCHW."""
    formats = []

    def times(module, x):
        formats.append((plan.mode() if module.mask is not None else "torch", x.is_contiguous(), module.weight.stride()))
        if module.mask is None:
            return dict.fromkeys(plan.DIRECTIONS, 3.0 if x.is_contiguous() else 2.0)
        if plan.mode() == "dense":
            return {"forward": 4.0, "dgrad": 1.5, "wgrad": 4.0}
        plan.note(site, "forward", layout_of(module.mask), "native")
        return dict.fromkeys(plan.DIRECTIONS, 1.0 if module.mask.float().mean() < 0.2 else 4.0)

    site = plan.site("of no op")
    monkeypatch.setattr(speed, "_times", times)
    model = granet.sparsify(nn.Sequential(nn.Conv2d(8, 10, 2), nn.Conv2d(10, 8, 2)))
    found = measure_layers(model, (8, 4, 4), {"0": 0.1, "1": 0.5}, Unstructured(), 2)
    assert formats[:3] == [
        ("torch", True, (32, 4, 2, 1)),
        ("torch", False, (32, 1, 16, 8)),
        ("dense", True, (32, 4, 2, 1)),
    ]
    assert {each[0] for each in formats} == {"torch", "dense", "native"}
    assert (found["0"].dense_seconds, found["0"].seconds, found["0"].implementation) == (6.0, 3.0, "native")
    assert (found["1"].dense_seconds, found["1"].seconds, found["1"].implementation) == (6.0, 6.0, "dense")


def test_weights_are_zero_off_the_mask_while_dense_code_is_measured(monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "_least", lambda call: (call(), 1.0)[1])
    forward = granet.SparseLinear.forward

    def watched(self, x):
        if self.mask is not None:
            seen.append(bool((self.weight * ~self.mask).any()))
        return forward(self, x)

    monkeypatch.setattr(granet.SparseLinear, "forward", watched)
    layer = granet.sparsify(nn.Linear(20, 10))
    speed._measure(layer, torch.randn(3, 20), 0.3, Unstructured())
    assert seen
    assert not any(seen)
