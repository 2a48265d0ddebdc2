"""Loss and accuracy of a network on a split, and of a finished run on its test set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from granet.config import TrainConfig
from granet.data import Data, load_data
from granet.data.split import Split
from granet.models import create_model
from granet.run import LAST, RunFolder


def pick_device(name: str) -> torch.device:
    """The device of a configuration; auto is CUDA where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}: {str(error).splitlines()[0]}") from None
    return device


def build_model(config: TrainConfig, data: Data, device: torch.device) -> nn.Module:
    """The configuration's network for these images, with weights drawn from torch's global generator."""
    model = create_model(config.model, data.num_classes, data.in_channels, image_size=data.image_shape[1])
    model.to(device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The context in which the configuration's forward passes run."""
    enabled = config.precision != "float32"
    return torch.autocast(device.type, getattr(torch, config.precision if enabled else "bfloat16"), enabled=enabled)


@torch.no_grad()
def loss_and_accuracy(network: Callable[[Tensor], Tensor], split: Split, config: TrainConfig) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0-1) over every example of a split. The network is in evaluation mode."""
    loss = correct = torch.zeros((), dtype=torch.float64)
    for images, labels in split.batches(config.batch_size):
        with autocast(config, images.device):
            outputs = network(arrange(images, config))
        loss = loss.to(images.device) + F.cross_entropy(outputs.float(), labels, reduction="sum").double()
        correct = correct.to(images.device) + (outputs.argmax(1) == labels).sum()
    return loss.item() / split.examples, correct.item() / split.examples


def arrange(images: Tensor, config: TrainConfig) -> Tensor:
    """The images in the memory format that the configuration asks for."""
    return images.contiguous(memory_format=torch.channels_last) if config.channels_last else images


def load_run(path: Path, weights: str = LAST, **changes: Any) -> tuple[TrainConfig, Data, nn.Module]:
    """A run's configuration, data and trained dense network in evaluation mode.

    Args:
        path: the run folder.
        weights: "model" for those of the last epoch, "best" for those of the best validation accuracy.
        changes: root, device or batch_size, where they are not as they were in the run.
    Raises:
        FileNotFoundError: there is no run, or not so far.
        CheckpointError: the weights are damaged.
        ValueError: the weights are not of this model, or the data or device are missing.
    """
    folder = RunFolder(path)
    config = folder.load_config()
    state = folder.load_weights(f"{weights}.safetensors")
    if "root" in changes:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=changes.pop("root")))
    config = dataclasses.replace(config, **changes)
    device = pick_device(config.device)
    data = load_data(config.data, config.seed, device)
    return config, data, dense_model(config, data, state, device)


def dense_model(config: TrainConfig, data: Data, state: dict[str, Tensor], device: torch.device) -> nn.Module:
    """The dense network with the given weights, in evaluation mode.

    Raises:
        ValueError: the weights are not of this network.
    """
    model = build_model(config, data, device)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the weights do not fit model {config.model!r}: {' '.join(str(error).split())}") from None
    return model.eval()


def evaluate_run(path: Path, weights: str = LAST, **changes: Any) -> dict[str, float]:
    """Test loss and accuracy of a finished run. Arguments and errors are those of load_run."""
    config, data, model = load_run(path, weights, **changes)
    loss, accuracy = loss_and_accuracy(model, data.test, config)
    return {"test_loss": loss, "test_accuracy": accuracy}
