"""VGG-19 with batch norm in the form used on CIFAR."""

from __future__ import annotations

from torch import Tensor, nn

from granet.models.init import init_convs

_WIDTHS_19 = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))


class VGG(nn.Module):
    """Groups of 3x3 convolutions without bias, batch norm and ReLU; a 2x2 max-pool between groups, then one Linear.

    Args:
        groups: (width, number of convolutions) of each group.
    Source: Simonyan & Zisserman, arXiv:1409.1556; the CIFAR form with one Linear layer of GraNet, arXiv:2106.10404.
    """

    def __init__(self, groups: tuple[tuple[int, int], ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for index, (width, depth) in enumerate(groups):
            if index > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, height, width), sides of at least 16 -> (batch, num_classes)."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def vgg19(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-19-BN for CIFAR: 16 convolutions, 4 max-pools, average pool, Linear; 20,024,000 weights at 10 classes."""
    return VGG(_WIDTHS_19, num_classes, in_channels)
