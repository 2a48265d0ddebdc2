"""The models by name: weight counts of the papers, shapes of their outputs, initial weights, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from granet.models import create_model, model_names


def masked_weights(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))


@pytest.mark.parametrize(
    ("name", "num_classes", "weights"),
    [
        ("vgg19", 10, 20_024_000),
        ("vgg19", 100, 20_024_000 + 90 * 512),
        ("resnet20", 10, 268_336),
        ("resnet56", 10, 848_944),
        ("resnet50-cifar", 10, 23_467_712),
        ("resnet50-cifar", 100, 23_652_032),
        ("resnet50", 1000, 25_502_912),
    ],
)
def test_weight_counts_are_the_published_ones(name: str, num_classes: int, weights: int) -> None:
    with torch.device("meta"):
        assert masked_weights(create_model(name, num_classes)) == weights


def test_digits_cnn_and_mlp_are_small() -> None:
    assert masked_weights(create_model("digits-cnn", in_channels=1)) == 130_592
    assert masked_weights(create_model("mlp", in_channels=1)) == 64 * 300 + 300 * 100 + 100 * 10


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mlp", 8),
        ("mlp", 28),
        ("digits-cnn", 8),
        ("digits-cnn", 28),
        ("vgg19", 28),
        ("vgg19", 32),
        ("resnet20", 32),
        ("resnet56", 28),
        ("resnet50-cifar", 28),
    ],
)
def test_own_models_map_images_to_logits(name: str, size: int, in_channels: int) -> None:
    model = create_model(name, num_classes=7, in_channels=in_channels, image_size=size)
    images = torch.randn(2, in_channels, size, size, requires_grad=True)
    logits = model(images)
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_vgg19_is_sixteen_convs_four_pools_and_one_linear() -> None:
    kinds = [type(m).__name__ for m in create_model("vgg19").modules()]
    counts = {kind: kinds.count(kind) for kind in ("Conv2d", "BatchNorm2d", "MaxPool2d", "Linear")}
    assert counts == {"Conv2d": 16, "BatchNorm2d": 16, "MaxPool2d": 4, "Linear": 1}
    convs = [m for m in create_model("vgg19").modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is None for conv in convs)


def test_resnet50_cifar_keeps_the_resolution_until_its_second_stage() -> None:
    model = create_model("resnet50-cifar").eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, x, y, name=name: shapes.__setitem__(name, tuple(y.shape[1:])))
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert shapes == {
        "conv1": (64, 32, 32),
        "layer1": (256, 32, 32),
        "layer2": (512, 16, 16),
        "layer3": (1024, 8, 8),
        "layer4": (2048, 4, 4),
    }


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides() -> None:
    block = create_model("resnet20").get_submodule("layer2.0").eval()
    nn.init.zeros_(block.get_parameter("conv2.weight"))  # the branch now yields 0: only the shortcut is left
    x = torch.rand(1, 16, 7, 7)
    y = block(x)
    assert y.shape == (1, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("name", ["vgg19", "resnet20", "digits-cnn"])
def test_convs_start_from_hes_normal_over_the_fan_out(name: str) -> None:
    torch.manual_seed(0)
    for module in create_model(name).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            expected = math.sqrt(2 / (module.out_channels * 9))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)
            assert abs(module.weight.mean().item()) < 0.06 * expected


def test_initial_weights_follow_the_global_generator() -> None:
    torch.manual_seed(3)
    first = create_model("resnet20").state_dict()
    torch.manual_seed(3)
    second = create_model("resnet20").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_resnet50_is_torchvisions_for_imagenet() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        ours, theirs = create_model("resnet50", 1000), torchvision.models.resnet50()
    assert type(ours) is type(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.get_submodule("layer2.0.conv2").stride == (2, 2)  # v1.5: the 3x3 convolution strides, not the 1x1


def test_resnet50_takes_the_published_number_of_multiply_adds() -> None:
    with torch.device("meta"):
        model, image = create_model("resnet50", 1000), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() == 2 * 4_089_184_256


def test_prefix_forces_torchvisions_model() -> None:
    with torch.device("meta"):
        ours, theirs = create_model("vgg19"), create_model("torchvision/vgg19")
    assert masked_weights(ours) == 20_024_000
    assert "features.34.weight" in theirs.state_dict()
    assert theirs.get_submodule("classifier.6").out_features == 10


def test_image_size_and_options_reach_torchvision() -> None:
    with torch.device("meta"):
        vit = create_model("vit_b_16", image_size=64)
        alexnet = create_model("alexnet", dropout=0.25)
    assert vit.get_parameter("encoder.pos_embedding").shape[1] == 1 + (64 // 16) ** 2
    assert alexnet.get_submodule("classifier.0").p == 0.25


def test_models_with_auxiliary_heads_return_logits_while_training() -> None:
    model = create_model("googlenet", num_classes=5)
    assert model.training
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_model_names_lists_own_models_first_and_every_name_is_accepted() -> None:
    names = model_names()
    assert names[:6] == ["mlp", "digits-cnn", "vgg19", "resnet20", "resnet56", "resnet50-cifar"]
    assert len(names) == len(set(names))
    assert {"resnet50", "mobilenet_v2", "torchvision/vgg19"} <= set(names)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "resnet5"}, "unknown model 'resnet5'; did you mean .*resnet50"),
        ({"name": "vgg-19"}, "did you mean .*vgg19"),
        ({"name": "torchvision/resnet20"}, "unknown model 'torchvision/resnet20'"),
        ({"name": "qqqq"}, r"unknown model 'qqqq' \(granet's own: mlp, "),
        ({"name": "vgg19", "depth": 3}, r"'vgg19' takes the options \[\], got \['depth'\]"),
        ({"name": "resnet18", "depth": 3}, "'resnet18' of torchvision .*'depth'"),
        ({"name": "resnet18", "in_channels": 1}, "expects images of 3 channels, got 1"),
        ({"name": "resnet20", "num_classes": 0}, "num_classes >= 1"),
        ({"name": "resnet20", "in_channels": 0}, "in_channels >= 1"),
        ({"name": "mlp", "image_size": 0}, "image_size >= 1, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_bad_arguments_are_named(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**call)
