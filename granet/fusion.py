"""Native code for what lies between the sparse layers: norms, activations and pooling."""

from __future__ import annotations

from torch import nn

from granet.norms import BatchNorm2d, Sequential
from granet.pooling import MaxPool2d


def fuse(model: nn.Module) -> None:
    """Turn layers of `model` into granet's own subclasses, in place: parameters, buffers, hooks and references stay.

    nn.BatchNorm2d, nn.MaxPool2d and every nn.Sequential with a norm among its children are replaced, and torchvision's
    residual blocks. Their subclasses are left alone: what they compute is theirs to know.
    """
    classes = _block_classes(model)
    classes.update({nn.BatchNorm2d: BatchNorm2d, nn.MaxPool2d: MaxPool2d, nn.Sequential: Sequential})
    for module in model.modules():
        if type(module) is nn.Sequential and not any(isinstance(each, nn.BatchNorm2d) for each in module):
            continue  # nothing to put together
        module.__class__ = classes.get(type(module), type(module))


def _block_classes(model: nn.Module) -> dict[type[nn.Module], type[nn.Module]]:
    if not any(type(module).__module__ == "torchvision.models.resnet" for module in model.modules()):
        return {}
    from granet import norm_blocks  # here, since it imports torchvision, which takes long

    return dict(norm_blocks.CLASSES)
