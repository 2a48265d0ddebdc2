"""Initial weights of granet's own networks."""

from __future__ import annotations

from torch import nn


def init_convs(model: nn.Module) -> None:
    """Draw every Conv2d weight of `model` from He's normal distribution over the fan-out, in place.

    Fan-out keeps the variance of the gradients from layer to layer; it is what the reference code of VGG-BN and ResNet
    uses. Batch norms (1, 0) and Linear layers (uniform, +-1/sqrt(fan-in)) keep PyTorch's defaults.

    Source: He et al., arXiv:1502.01852, section 2.2.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
