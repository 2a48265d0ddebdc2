"""torchvision's residual blocks with fused norms. They bear torchvision's names, so that a model prints as before."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import resnet

from granet.norms import norm_relu


class BasicBlock(resnet.BasicBlock):
    """torchvision's BasicBlock; each batch norm, what is added to it and the ReLU are one operation."""

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.bn1, self.conv1(x), relu=self.relu)
        y = self.conv2(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return norm_relu(self.bn2, y, shortcut, self.relu)


class Bottleneck(resnet.Bottleneck):
    """torchvision's Bottleneck; each batch norm, what is added to it and the ReLU are one operation."""

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.bn1, self.conv1(x), relu=self.relu)
        y = norm_relu(self.bn2, self.conv2(y), relu=self.relu)
        y = self.conv3(y)
        shortcut = x if self.downsample is None else self.downsample(x)
        return norm_relu(self.bn3, y, shortcut, self.relu)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {resnet.BasicBlock: BasicBlock, resnet.Bottleneck: Bottleneck}
