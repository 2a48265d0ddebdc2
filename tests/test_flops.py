"""MACs of real layers, and the known FLOPs of ResNet-50."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet50

from granet import flops
from granet.distribution import capped_uniform_counts, layer_counts
from granet.flops import TrainingFlops, layer_macs, training_flops_ratio
from granet.schedule import cubic_sparsity

# Counting


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Linear(7, 3), (7,), 21),
        (nn.Linear(7, 3), (5, 7), 105),
        (nn.Conv2d(3, 8, 3, padding=1, bias=False), (3, 10, 12), 3 * 8 * 9 * 120),
        (nn.Conv2d(3, 8, 3, stride=2), (3, 9, 9), 3 * 8 * 9 * 16),
        (nn.Conv2d(6, 12, (1, 5), groups=3, padding="same", padding_mode="circular"), (6, 4, 7), 2 * 12 * 5 * 28),
        (nn.Conv2d(4, 4, 3, groups=4, dilation=2), (4, 7, 7), 4 * 9 * 9),
        (nn.Conv1d(2, 3, 4), (2, 10), 2 * 3 * 4 * 7),
        (nn.Conv3d(1, 2, 2), (1, 3, 3, 3), 2 * 8 * 8),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5), 4 * 25 * 9 * 3),
        (nn.ConvTranspose1d(2, 3, 4), (2, 5), 2 * 3 * 4 * 5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_macs_of_one_layer(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert layer_macs(nn.Sequential(nn.Identity(), layer), shape) == {"1": macs}
    assert layer_macs(layer, torch.ones(1, *shape)) == {"": macs}


def test_shared_layers_are_summed_and_unused_ones_zero() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Conv2d(1, 1, 1)
            self.first = nn.Linear(4, 4)
            self.again = self.first
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(input=self.again(self.first(x)))

    assert layer_macs(Shared(), (4,)) == {"unused": 0, "first": 32, "last": 8}


def test_token_inputs() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 6)
            self.head = nn.Linear(6, 11)

        def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
            return self.head(self.embedding(tokens) * keep[..., None])

    tokens = torch.zeros(1, 5, dtype=torch.long)
    assert layer_macs(Tokens(), (tokens, torch.ones(1, 5))) == {"head": 5 * 66}


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "sequence-first"])
def test_projections_of_attention(batch_first: bool) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=3, vdim=5, batch_first=batch_first)

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.attention(query, key=key, value=value)[0]

    tensors = torch.ones(1, 4, 8), torch.ones(1, 6, 3), torch.ones(1, 6, 5)
    macs = layer_macs(Cross(), tensors if batch_first else tuple(t.transpose(0, 1) for t in tensors))
    assert macs == {
        "attention.q_proj": 8 * 4 * 8,
        "attention.k_proj": 8 * 6 * 3,
        "attention.v_proj": 8 * 6 * 5,
        "attention.out_proj": 4 * 8 * 8,
    }


def test_transformer_layer_off_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    assert layer_macs(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), (5, 8)) == {
        "layers.0.self_attn.in_proj": 5 * 3 * 64,
        "layers.0.self_attn.out_proj": 5 * 64,
        "layers.0.linear1": 5 * 128,
        "layers.0.linear2": 5 * 128,
    }
    assert torch.backends.mha.get_fastpath_enabled()


def test_model_and_random_state_are_left_alone() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), Noisy(), nn.Dropout(), nn.Flatten(), nn.Linear(12, 2))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    layer_macs(model, (2, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())


def test_failing_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        layer_macs(model, (3,))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_inputs_follow_the_dtype_of_the_model() -> None:
    assert layer_macs(nn.Linear(3, 2).double(), (3,)) == {"": 6}


@pytest.mark.parametrize("inputs", [(), (3, 0), (3, 2.5), (torch.zeros(1), 3)], ids=str)
def test_inputs_of_another_form(inputs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected the shape of one example, a tensor or a tuple of tensors"):
        layer_macs(nn.Linear(3, 2), inputs)


def test_lazy_layers_are_named() -> None:
    with pytest.raises(ValueError, match=r"got lazy parameters 1\.weight, 1\.bias"):
        layer_macs(nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(4)), (3,))


# Ratios


def test_ratio_on_paper() -> None:
    # (30 * .5 + 50 * .1 + 20) / 100
    assert flops.test_flops_ratio({"a": 30, "b": 50, "c": 20}, {"a": 0.5, "b": 0.1}) == pytest.approx(0.4)
    assert flops.test_flops_ratio({"a": 30}, {}) == 1.0
    assert flops.test_flops_ratio({"a": 30}, {"a": 0.0}) == 0.0


def test_training_on_paper() -> None:
    # Steps of f = .25 cost .25, those with the dense gradient (2 * .25 + 1) / 3 = .5.
    total = TrainingFlops({"a": 10})
    total.add({"a": 0.25}, dense_gradient=False, steps=3)
    assert total.ratio == 0.25
    total.add({"a": 0.25}, dense_gradient=True)
    assert total.steps == 4
    assert total.ratio == pytest.approx((3 * 0.25 + 0.5) / 4)


def test_counters_survive_json() -> None:
    macs = {"a": 7, "b": 3}
    straight, resumed = TrainingFlops(macs), TrainingFlops(macs)
    for step in range(20):
        densities = {"a": 1 / (step + 1), "b": 0.1}
        straight.add(densities, dense_gradient=step % 3 == 0)
        resumed.add(densities, dense_gradient=step % 3 == 0)
        state = json.loads(json.dumps(resumed.state_dict()))
        resumed = TrainingFlops(macs)
        resumed.load_state_dict(state)
    assert resumed.ratio == straight.ratio
    assert resumed.state_dict() == straight.state_dict()


def test_schedule_equals_its_steps() -> None:
    macs = {"a": 7, "b": 3}
    total = TrainingFlops(macs)
    for step in range(50):
        total.add({"a": 1.0 if step < 20 else 0.3}, step % 10 == 9)
    ratio = training_flops_ratio(macs, lambda s: {"a": 1.0 if s < 20 else 0.3}, lambda s: s % 10 == 9, 50)
    assert ratio == pytest.approx(total.ratio, rel=1e-14)


def test_every_step_with_the_dense_gradient() -> None:
    # SNFS, DPF: (2 * mean f + 1) / 3 with f = 1, .75, .5, .25
    ratio = training_flops_ratio({"a": 8}, lambda s: {"a": 1 - s / 4}, lambda s: True, 4)
    assert ratio == pytest.approx((2 * 0.625 + 1) / 3)


def test_bad_ratios() -> None:
    macs = {"a": 30, "b": 50}
    with pytest.raises(ValueError, match="known MACs, got aa, bb"):
        flops.test_flops_ratio(macs, {"bb": 0.5, "aa": 0.5})
    for density in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"densities in \[0, 1\], got {{'a': {density}}}"):
            flops.test_flops_ratio(macs, {"a": density})
    for nothing in ({}, {"a": 0}):
        with pytest.raises(ValueError, match="got no multiply-accumulates"):
            flops.test_flops_ratio(nothing, {})


def test_bad_counters() -> None:
    total = TrainingFlops({"a": 1})
    with pytest.raises(ValueError, match="one step or more"):
        _ = total.ratio
    with pytest.raises(ValueError, match="steps >= 0, got -1"):
        total.add({}, dense_gradient=False, steps=-1)
    for state in ({}, {"steps": 1}, {"steps": -1, "cost": 0.0}, {"steps": 1, "cost": math.nan}):
        with pytest.raises(ValueError, match="expected non-negative 'steps' and 'cost'"):
            total.load_state_dict(state)
    with pytest.raises(ValueError, match="one step or more"):
        training_flops_ratio({"a": 1}, lambda s: {}, lambda s: False, 0)


# ResNet-50 v1.5 at sparsity .9: the known figures


class ResNet50:
    """Layer names, weight sizes and MACs of torchvision's ResNet-50."""

    def __init__(self) -> None:
        model = resnet50()
        self.macs = layer_macs(model, (3, 224, 224))
        self.shapes = [tuple(model.get_submodule(name).weight.shape) for name in self.macs]
        self.units = [math.prod(shape) for shape in self.shapes]

    def densities(self, counts: list[int]) -> dict[str, float]:
        return {name: count / n for name, count, n in zip(self.macs, counts, self.units, strict=True)}


@pytest.fixture(scope="module")
def resnet() -> ResNet50:
    return ResNet50()


def test_macs_of_resnet50(resnet: ResNet50) -> None:
    assert sum(resnet.macs.values()) == 4_089_184_256
    assert len(resnet.macs) == 54
    assert resnet.macs["conv1"] == 118_013_952
    assert resnet.macs["fc"] == 2_048_000


def test_erk_test_and_rigl_training_flops(resnet: ResNet50) -> None:
    densities = resnet.densities(layer_counts("erk", resnet.shapes, resnet.units, 0.9))
    assert flops.test_flops_ratio(resnet.macs, densities) == pytest.approx(0.242, abs=0.001)
    # RigL looks at the dense gradient every 100 steps until 75 % of the 32,000.
    ratio = training_flops_ratio(
        resnet.macs, lambda step: densities, lambda step: step % 100 == 0 and step < 24_000, 32_000
    )
    assert ratio == pytest.approx(0.244, abs=0.001)


@pytest.mark.parametrize(("interval", "expected"), [(1, 0.5016), (100, 0.5029), (200, 0.5043), (1000, 0.5157)])
def test_gmp_training_flops(resnet: ResNet50, interval: int, expected: float) -> None:
    """The known value .504 comes out with events every 200 steps; a ramp that moves at every step has .502.

    Uniform, first convolution dense, last layer not beyond .8, cubic from step 10,000 to 25,000 of 32,000. Between two
    events the density stays at that of the earlier one, so that a longer interval costs more.
    """
    caps = [0.0] + [1.0] * (len(resnet.units) - 2) + [0.8]

    @cache
    def densities_of_event(event: int) -> dict[str, float]:
        sparsity = cubic_sparsity(event, 10_000, 25_000, 0.0, 0.9)
        return resnet.densities(capped_uniform_counts(resnet.units, sparsity, caps))

    ratio = training_flops_ratio(
        resnet.macs, lambda step: densities_of_event(step // interval * interval), lambda step: False, 32_000
    )
    assert ratio == pytest.approx(expected, abs=1e-4)
    if interval == 200:
        assert ratio == pytest.approx(0.504, abs=0.001)


def test_flops_by_layer() -> None:
    macs = {"a": 100, "b": 50}
    assert flops.layer_flops(macs, {"a": 0.25}) == {"a": 50, "b": 100}
    with pytest.raises(ValueError, match="expected densities of layers with known MACs, got c"):
        flops.layer_flops(macs, {"c": 0.5})
