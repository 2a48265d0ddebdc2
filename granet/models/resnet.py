"""Residual networks for CIFAR: ResNet-20 and -56 of He et al., and ResNet-50 with a small stem."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from granet.models.init import init_convs
from granet.norms import norm_relu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut that has no weights (option A).

    Where the block halves the image and widens it, the shortcut takes every second pixel and pads the missing channels
    with zeros, half of them on either side.

    Source: He et al., arXiv:1512.03385, section 3.3 and 4.2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        missing = out_channels - in_channels
        self.channel_padding = (missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, height, width) -> (batch, out_channels, ceil(height / stride), ceil(width / stride))."""
        y = self.conv2(norm_relu(self.bn1, self.conv1(x)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if any(self.channel_padding):
            shortcut = F.pad(shortcut, (0, 0, 0, 0, *self.channel_padding))
        return norm_relu(self.bn2, y, shortcut)


class CifarResNet(nn.Module):
    """A 3x3 stem of 16 channels, three stages of `blocks` BasicBlocks with 16, 32, 64 channels; 6*blocks+2 layers.

    Source: He et al., arXiv:1512.03385, section 4.2.
    """

    def __init__(self, blocks: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, height, width) -> (batch, num_classes)."""
        x = norm_relu(self.bn1, self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.pool(x).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-20 for CIFAR: 268,336 weights at 10 classes."""
    return CifarResNet(3, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """ResNet-56 for CIFAR: 848,944 weights at 10 classes."""
    return CifarResNet(9, num_classes, in_channels)


def resnet50_cifar(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """ResNet-50 for CIFAR: torchvision's with a 3x3 stem of stride 1, no max-pool and a Linear layer without bias.

    23,467,712 weights at 10 classes, 23,652,032 at 100. The keys of the state are torchvision's.

    Source: GraNet, arXiv:2106.10404, appendix.
    """
    import torchvision  # here, since its import takes longer than building any of the other networks

    model: nn.Module = torchvision.models.resnet50(weights=None, num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Linear(2048, num_classes, bias=False)
    init_convs(model)
    return model
