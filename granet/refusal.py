"""What a Sparsifier refuses, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from granet.masked import MaskedParameter
from granet.methods import Method
from granet.optimizer_state import group_of
from granet.topology import Layer


def checked_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers as a list; ValueError if that is not what they are."""
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    if not optimizers or not all(isinstance(each, Optimizer) for each in optimizers):
        got = ", ".join(type(each).__name__ for each in optimizers) or "none"
        raise ValueError(f"expected a torch.optim.Optimizer or a list of them, got {got}")
    return optimizers


def check(model: nn.Module, layers: Sequence[Layer], optimizers: Sequence[Optimizer], method: Method) -> None:
    """Raise ValueError if a method cannot make these layers sparse, or an optimizer does not hold them."""
    if not isinstance(method, Method):
        raise ValueError(f"expected a method such as granet.methods.GraNet(...), got {method!r}")
    if not layers:
        raise ValueError("no layer to sparsify: expected a model that went through granet.sparsify, got none sparse")
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    fast = {module for encoder in encoders for module in encoder.modules()}
    for layer in layers:
        if layer.owner.mask is not None:
            raise ValueError(f"layer '{layer.name}' is bound to a Sparsifier already: call its remove() first")
        if all(group_of(each, layer.weight) is None for each in optimizers):
            raise ValueError(
                f"the optimizer does not hold the weight of layer '{layer.name}': expected one made from this "
                "model's parameters()"
            )
        if not method.zeroing and isinstance(layer.owner, MaskedParameter):
            raise ValueError(
                f"layer '{layer.name}': {method.name} keeps values off the mask, which only nn.Linear and "
                "nn.Conv2d can leave out; exclude this layer"
            )
        if not method.zeroing and layer.owner in fast:
            raise ValueError(
                f"layer '{layer.name}': {method.name} keeps values off the mask, which the fast path of "
                "nn.TransformerEncoderLayer computes with in evaluation; exclude this layer"
            )
    idle = [each for each in optimizers if all(group_of(each, la.weight) is None for la in layers)]
    if idle:
        raise ValueError(f"an optimizer ({type(idle[0]).__name__}) holds no sparse weight of the model: leave it out")
