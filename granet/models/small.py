"""Networks for small images, such as the 8x8 digits and 28x28 Fashion-MNIST."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from granet.models.init import init_convs


def mlp(num_classes: int = 10, in_channels: int = 1, image_size: int = 8) -> nn.Sequential:
    """LeNet-300-100: two hidden Linear layers with ReLU on the flattened image.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", 1998.
    """
    layers = {
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(in_channels * image_size * image_size, 300),
        "relu1": nn.ReLU(inplace=True),
        "fc2": nn.Linear(300, 100),
        "relu2": nn.ReLU(inplace=True),
        "fc3": nn.Linear(100, num_classes),
    }
    return nn.Sequential(OrderedDict(layers))


def digits_cnn(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Four 3x3 convolutions with batch norm, one max-pool, a global average pool and a Linear layer.

    Some 130,000 weights: room for 90 % sparsity, and a few milliseconds a step on a CPU at 8x8 pixels.
    """
    layers = {
        **_conv("1", in_channels, 32),
        **_conv("2", 32, 64),
        "pool": nn.MaxPool2d(2),
        **_conv("3", 64, 64),
        **_conv("4", 64, 128),
        "mean": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(128, num_classes),
    }
    model = nn.Sequential(OrderedDict(layers))
    init_convs(model)
    return model


def _conv(number: str, in_channels: int, out_channels: int) -> dict[str, nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    relu = nn.ReLU(inplace=True)
    return {"conv" + number: conv, "bn" + number: nn.BatchNorm2d(out_channels), "relu" + number: relu}
