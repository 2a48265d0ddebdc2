"""What a data set offers the trainer: its splits, as batches of normalised images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from granet.data.seeds import generator

Batch = tuple[Tensor, Tensor]


class Split(ABC):
    """Examples in batches. Which images a batch holds depends on (seed, epoch, batch size, batch number) alone.

    Args:
        examples: number of examples, at least 1.
        shuffle: a new order every epoch; otherwise the stored order.
        seed: of the order and of the augmentation.
    """

    def __init__(self, examples: int, shuffle: bool, seed: int) -> None:
        self.examples = examples
        self.shuffle = shuffle
        self.seed = seed

    def steps_per_epoch(self, batch_size: int) -> int:
        """Number of batches of an epoch; the last one may be smaller than `batch_size`."""
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, got {batch_size}")
        return -(-self.examples // batch_size)

    def batches(self, batch_size: int, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches `start`, `start + 1`, ... of an epoch, the same bits as without the ones before.

        Args:
            batch_size: at least 1.
            epoch: at least 0.
            start: 0 <= start <= steps_per_epoch(batch_size).
        Returns:
            iterator of (images, labels): (batch, channels, height, width) float32 and (batch,) int64, on the device.
        Raises:
            ValueError: an argument is out of range.
        """
        steps = self.steps_per_epoch(batch_size)
        if epoch < 0:
            raise ValueError(f"expected epoch >= 0, got {epoch}")
        if not 0 <= start <= steps:
            raise ValueError(f"expected 0 <= start <= {steps} (the batches of an epoch), got {start}")
        if self.shuffle:
            order = torch.randperm(self.examples, generator=generator("order", self.seed, epoch))
        else:
            order = torch.arange(self.examples)
        return self._batches(order.split(batch_size), epoch, start)

    @abstractmethod
    def _batches(self, batches: tuple[Tensor, ...], epoch: int, start: int) -> Iterator[Batch]:
        """Load `batches[start:]`; each holds (batch,) int64 positions in this split."""


@dataclass(frozen=True)
class Data:
    """A data set. The test split is read by nobody until it is asked for batches.

    Args:
        num_classes: labels lie in [0, num_classes).
        image_shape: (channels, height, width) of the images in a batch.
        train: shuffled, and augmented if the configuration says so.
        validation: examples taken out of the training set, in order and not augmented; None if there are none.
        test: in order and not augmented.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    train: Split
    validation: Split | None
    test: Split

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.image_shape[0]


def split_validation(labels: Tensor, validation: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """Set examples of a training set aside, each class in proportion, at random by `seed`.

    The shares of the classes are rounded by largest remainder, ties to the lower class, so that the number is exact.

    Args:
        labels: (examples,) int64 on the CPU.
        validation: how many (int) or which fraction (float), as in `DataConfig`.
        seed: of the choice.
    Returns:
        positions of the remaining training examples and of the validation examples, int64, both rising.
    Raises:
        ValueError: no example would be left on one of the two sides (0 and 0.0 ask for no validation and are fine).
    """
    examples = len(labels)
    count = validation if isinstance(validation, int) else round(validation * examples)
    if validation == 0:
        return torch.arange(examples), torch.arange(0)
    if not 1 <= count < examples:
        raise ValueError(f"data.validation = {validation!r} asks for {count} of the {examples} training examples")
    sizes = torch.bincount(labels).tolist()
    shares = [count * size // examples for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda c: -(count * sizes[c] % examples))
    for label in by_remainder[: count - sum(shares)]:
        shares[label] += 1
    order = torch.randperm(examples, generator=generator("validation", seed))
    order = order[torch.argsort(labels[order], stable=True)]  # by class, at random within a class
    chosen = torch.zeros(examples, dtype=torch.bool)
    for of_class, share in zip(order.split(sizes), shares, strict=True):
        chosen[of_class[:share]] = True
    return torch.nonzero(~chosen).flatten(), torch.nonzero(chosen).flatten()
