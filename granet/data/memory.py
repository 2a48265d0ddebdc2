"""Data sets small enough to lie on the device: cropped, flipped and normalised a whole batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from granet.data.seeds import generator
from granet.data.split import Batch, Split


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the image after `padding` black pixels on each side; if `flip`, mirrored by the toss of a coin."""

    padding: int
    flip: bool


class MemorySplit(Split):
    """Images kept as bytes on the device.

    Args:
        images: (examples, channels, height, width) uint8 on the device.
        labels: (examples,) int64 on the device.
        mean: per channel, in the unit of the bytes.
        std: per channel, in the unit of the bytes; a batch holds (image - mean) / std.
        shuffle: a new order every epoch; otherwise the stored order.
        seed: of the order and of the augmentation.
        augmentation: None for the images as they are.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shuffle: bool = False,
        seed: int = 0,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(len(images), shuffle, seed)
        self.images = images
        self.labels = labels
        self.augmentation = augmentation
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(mean, dtype=torch.float32, device=images.device).view(shape)
        self._std = torch.tensor(std, dtype=torch.float32, device=images.device).view(shape)

    def _batches(self, batches: tuple[Tensor, ...], epoch: int, start: int) -> Iterator[Batch]:
        for number in range(start, len(batches)):
            chosen = batches[number].to(self.images.device)
            images = self.images[chosen]
            if self.augmentation is not None:
                images = _augment(images, self.augmentation, generator("augment", self.seed, epoch, number))
            yield images.to(torch.float32).sub_(self._mean).div_(self._std), self.labels[chosen]


def _augment(images: Tensor, augmentation: Augmentation, rng: torch.Generator) -> Tensor:
    batch, padding = len(images), augmentation.padding
    shifts = torch.randint(0, 2 * padding + 1, (2, batch), generator=rng)
    flips = torch.randint(0, 2, (1, batch), generator=rng) * int(augmentation.flip)
    down, right, flip = torch.cat([shifts, flips]).to(images.device)
    return crop_flip(images, padding, down, right, flip.bool())


def crop_flip(images: Tensor, padding: int, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    """Pad each image with zeros, cut a window of its size out at (down, right) and mirror that left to right.

    One gather does it all; it is faster than a copy per image, on CPU and on GPU.

    Args:
        images: (batch, channels, height, width), any dtype.
        padding: pixels added on each of the four sides.
        down: (batch,) int64 in [0, 2 * padding], first row of the window; `padding` leaves the image where it is.
        right: (batch,) int64 in [0, 2 * padding], first column of the window.
        flip: (batch,) bool, whether the window is mirrored.
    Returns:
        images of the same shape, contiguous.
    """
    batch, channels, height, width = images.shape
    padded = F.pad(images, (padding, padding, padding, padding)).reshape(batch, channels, -1)
    rows = torch.arange(height, device=images.device) + down[:, None]
    cols = torch.arange(width, device=images.device).expand(batch, width)
    cols = torch.where(flip[:, None], width - 1 - cols, cols) + right[:, None]
    index = rows[:, :, None] * (width + 2 * padding) + cols[:, None, :]  # (batch, height, width)
    index = index.view(batch, 1, -1).expand(batch, channels, -1)
    return padded.gather(2, index).view(batch, channels, height, width)
