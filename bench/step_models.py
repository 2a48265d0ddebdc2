"""A model with its optimizer in each implementation that is compared, all from the same initial weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import granet
from bench.verify import WrongResultError, check_close, check_zero_off
from granet.flops import layer_macs
from granet.fusion import fuse
from granet.methods import Static
from granet.models import create_model
from granet_kernels import plan

DENSE = ("dense", "dense-channels_last")
WITHOUT_MASKS = (*DENSE, "dense-granet-norms")  # the last: granet's batch norm and pooling, but nothing sparse
IMPLEMENTATIONS = (*WITHOUT_MASKS, "dense-times-mask", "granet", "granet-native", "granet-channels_last")
CLASSES = 10

# Rounding flips signs at ReLUs and winners in max-pools, so that gradients of torch's own two layouts differ by up to
# 5 % in ResNet-50. A wrong layer is wrong by more; bench.layers looks at each of them in float64.
_GRADIENT_TOLERANCE = 0.2
_LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Setting:
    """What a trained model depends on."""

    model: str
    batch: int
    image_size: int = 32
    distribution: str = "erk"
    fused: bool = False


class TimesMask(nn.Module):
    """Parametrization weight -> weight * mask, which is how most published code trains sparse models."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Trainer:
    """A whole training step: forward, loss, backward, optimizer step, gradients set to None.

    Args:
        setting: of the model.
        implementation: one of IMPLEMENTATIONS.
        granularity, sparsity: of the masks; a dense implementation has none.
    """

    def __init__(
        self, setting: Setting, implementation: str, granularity: str = "dense", sparsity: float = 0.0
    ) -> None:
        self.setting = setting
        self.implementation = implementation
        torch.manual_seed(0)
        self.model = create_model(setting.model, CLASSES)
        self.masks: dict[str, Tensor] = {}
        if implementation not in WITHOUT_MASKS:
            self.masks = self._sparsify(granularity, sparsity)
        if implementation == "dense-granet-norms":
            fuse(self.model)
        images, labels = batch_of(setting)
        if implementation.endswith("channels_last"):
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = images.contiguous(memory_format=torch.channels_last)
        self._images, self._labels = images, labels
        self.optimizer = self._make_optimizer()
        if implementation.startswith("granet"):
            self._bind(sparsity)
        self.loss = torch.zeros(())

    def step(self) -> None:
        with self._plan():
            self.loss = self._backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """The loss, and the gradient of every parameter by its name in the dense model; nothing is trained."""
        with self._plan():
            loss = self._backward()
        found = {"loss": loss}
        for name, parameter in self.model.named_parameters():
            assert parameter.grad is not None
            found[name.replace(".parametrizations.weight.original", ".weight")] = parameter.grad
        self.optimizer.zero_grad()
        return found

    @property
    def uses_measured_plan(self) -> bool:
        return self.implementation in ("granet", "granet-channels_last")

    def check_loss(self) -> None:
        """Raise WrongResultError if the last step had no finite loss: arithmetic with NaN has times of its own."""
        if not bool(torch.isfinite(self.loss)):
            raise WrongResultError(f"expected a finite loss after the last step, got {float(self.loss)}")

    def useful_flops(self) -> float:
        """FLOPs of a step at kept weights, by granet's convention: three times the forward pass of Linear and Conv."""
        macs = layer_macs(
            create_model(self.setting.model, CLASSES), (3, self.setting.image_size, self.setting.image_size)
        )
        density = {name: float(mask.float().mean()) for name, mask in self.masks.items()}
        return 3 * 2 * self.setting.batch * sum(count * density.get(name, 1.0) for name, count in macs.items())

    def _backward(self) -> Tensor:
        loss = F.cross_entropy(self.model(self._images), self._labels)
        loss.backward()
        return loss.detach()

    def _plan(self) -> AbstractContextManager[object]:
        if not self.implementation.startswith("granet"):
            return nullcontext()
        return plan.use("measured" if self.uses_measured_plan else "native")

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = self.model.parameters()
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, fused=self.setting.fused)

    def _sparsify(self, granularity: str, sparsity: float) -> dict[str, Tensor]:
        """Draw the masks and zero the weights; the model becomes the implementation's, unbound."""
        sparse = granet.sparsify(create_model(self.setting.model, CLASSES), granularity)
        sparse.load_state_dict(self.model.state_dict())
        throwaway = torch.optim.SGD(sparse.parameters(), lr=0.0)
        sparsifier = granet.Sparsifier(sparse, throwaway, self._method(sparsity))
        masks = {layer.name: layer.mask.clone() for layer in sparsifier.layers}
        sparsifier.remove()
        if self.implementation.startswith("granet"):
            self.model = sparse
            return masks
        self.model.load_state_dict(sparse.state_dict())
        for name, mask in masks.items():
            parametrize.register_parametrization(self.model.get_submodule(name), "weight", TimesMask(mask))
        return masks

    def _bind(self, sparsity: float) -> None:
        """The same masks again, now of a Sparsifier whose hooks are part of the step."""
        sparsifier = granet.Sparsifier(self.model, self.optimizer, self._method(sparsity))
        assert all(torch.equal(layer.mask, self.masks[layer.name]) for layer in sparsifier.layers)

    def _method(self, sparsity: float) -> Static:
        return Static(sparsity=sparsity, distribution=self.setting.distribution, total_steps=1)


def batch_of(setting: Setting) -> tuple[Tensor, Tensor]:
    """The images and labels that every implementation trains on."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(setting.batch, 3, setting.image_size, setting.image_size, generator=generator)
    return images, torch.randint(0, CLASSES, (setting.batch,), generator=generator)


def check_image_size(setting: Setting) -> None:
    """Raise ValueError unless the model takes images of this size."""
    size = setting.image_size
    try:
        with torch.device("meta"):
            create_model(setting.model, CLASSES)(torch.empty(2, 3, size, size))
    except RuntimeError as error:
        raise ValueError(f"{setting.model} does not take images of {size}x{size} pixels: {error}") from error


def check_gradients(trainer: Trainer, reference: dict[str, Tensor]) -> None:
    """Raise WrongResultError unless loss and gradients are those of dense torch with the same weights.

    Args:
        reference: what the dense model with the masked weights gives; the gradients of sparse weights count at kept
            positions, and must be exactly zero elsewhere.
    """
    got = trainer.gradients()
    if got.keys() != reference.keys():
        raise WrongResultError(f"expected gradients of {', '.join(reference)}, got {', '.join(got)}")
    for name, expected in reference.items():
        mask = trainer.masks.get(name.removesuffix(".weight"))
        if mask is not None:
            check_zero_off(name, got[name], mask)
            expected = expected * mask
        check_close(name, got[name], expected, _LOSS_TOLERANCE if name == "loss" else _GRADIENT_TOLERANCE)


def reference_gradients(setting: Setting, granularity: str = "dense", sparsity: float = 0.0) -> dict[str, Tensor]:
    """Loss and gradients of dense torch; with a sparsity, of the weights masked as every sparse implementation's."""
    reference = Trainer(setting, "dense")
    if granularity != "dense":
        masked = Trainer(setting, "granet", granularity, sparsity).model
        reference.model.load_state_dict(masked.state_dict())
    return reference.gradients()
