"""The papers' networks, and every classification model of torchvision, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from granet.models.resnet import resnet20, resnet50_cifar, resnet56
from granet.models.small import digits_cnn, mlp
from granet.models.vgg import vgg19
from granet.names import suggestion

__all__ = ["create_model", "model_names"]

_OWN: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "digits-cnn": digits_cnn,
    "vgg19": vgg19,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet50-cifar": resnet50_cifar,
}
_PREFIX = "torchvision/"


def create_model(
    name: str,
    num_classes: int = 10,
    in_channels: int = 3,
    image_size: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build a freshly initialised classifier of images (batch, in_channels, height, width) -> (batch, num_classes).

    The initial weights are drawn from torch's global generator: seed it first.

    Args:
        name: one of `model_names()`. granet's own network comes first where torchvision has the same name;
            "torchvision/NAME" is always torchvision's. "resnet50" is torchvision's, for ImageNet (v1.5).
        num_classes: at least 1.
        in_channels: channels of the images; torchvision's models take 3 only.
        image_size: height and width of the images. Only the networks whose weights depend on it use it: "mlp" (8 if
            not given) and torchvision's "vit_*" (224 if not given); the others end in a global average pool.
        options: further keywords of the builder, e.g. `dropout` of torchvision's models.
    Raises:
        ValueError: no such model (the nearest names are given), or an argument it does not take.
    """
    if num_classes < 1 or in_channels < 1:
        raise ValueError(f"expected num_classes >= 1 and in_channels >= 1, got {num_classes} and {in_channels}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"expected image_size >= 1, got {image_size}")
    if name in _OWN:
        builder = _OWN[name]
        if image_size is not None and "image_size" in inspect.signature(builder).parameters:
            options["image_size"] = image_size
        _check_options(name, builder, options)
        return builder(num_classes=num_classes, in_channels=in_channels, **options)
    plain = name.removeprefix(_PREFIX)
    if plain not in _torchvision_names():
        raise ValueError(_unknown(name))
    if in_channels != 3:
        raise ValueError(f"model {name!r} is torchvision's and expects images of 3 channels, got {in_channels}")
    if image_size is not None and plain.startswith("vit_"):
        options["image_size"] = image_size
    return _torchvision_model(plain, num_classes, options)


def model_names() -> list[str]:
    """Names that `create_model` takes: granet's own, then torchvision's (with the prefix where ours has the name)."""
    theirs = [_PREFIX + name if name in _OWN else name for name in _torchvision_names()]
    return [*_OWN, *theirs]


def _check_options(name: str, builder: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    known = [key for key in inspect.signature(builder).parameters if key not in ("num_classes", "in_channels")]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"model {name!r} takes the options {known}, got {unknown}")


def _torchvision_names() -> list[str]:
    import torchvision  # here, since its import takes longer than building any of our own networks

    return list(torchvision.models.list_models(module=torchvision.models))


def _torchvision_model(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    import torchvision

    if name in ("googlenet", "inception_v3"):
        # With auxiliary heads these two return tuples while training; their slow default initialisation also warns.
        options = {"aux_logits": False, "init_weights": True, **options}
    options = {"weights": None, **options}
    try:
        model: nn.Module = torchvision.models.get_model(name, num_classes=num_classes, **options)
    except TypeError as error:
        raise ValueError(f"model {name!r} of torchvision does not take these options: {error}") from error
    return model


def _unknown(name: str) -> str:
    hint = suggestion(name, model_names(), most=3)
    return f"unknown model {name!r}{hint} (granet's own: {', '.join(_OWN)}; or any classification model of torchvision)"
