"""Data sets: the embedded digits, CIFAR, Fashion-MNIST, folders of images and arrays in a file.

Small sets lie on the device as bytes and are augmented there a batch at a time; folders of images go through
DataLoader workers. The same seed gives the same batches on every device, with any number of workers, and whether or not
the batches before were read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from granet.data.arrays import Arrays, channel_statistics, check_classes, read_npz
from granet.data.config import DataConfig
from granet.data.folder import load_folder
from granet.data.memory import Augmentation, MemorySplit
from granet.data.named import NAMED, read_digits, read_named
from granet.data.split import Data, Split, split_validation

__all__ = ["Data", "DataConfig", "Split", "load_data"]


def load_data(config: DataConfig, seed: int = 0, device: torch.device | str = "cpu") -> Data:
    """Load a data set.

    Args:
        config: which one, and how it is read.
        seed: of the validation split, the order of the training examples and their augmentation.
        device: of the batches.
    Raises:
        FileNotFoundError: its files are not under `config.root`; says what was looked for and how to get it.
        ValueError: its files are damaged or hold something else; names the file.
    """
    device = torch.device(device)
    if config.name == "imagenet":
        return load_folder(config, seed, device)
    arrays, num_classes, mean, std, augmentation = _read(config)
    kept, held_out = split_validation(arrays.train_labels, config.validation, seed)

    def split(images: Tensor, labels: Tensor, training: bool = False) -> MemorySplit:
        augment = augmentation if training and config.augment else None
        return MemorySplit(images.to(device), labels.to(device), mean, std, training, seed, augment)

    train_images, train_labels = arrays.train_images, arrays.train_labels
    channels, height, width = train_images.shape[1:]
    return Data(
        num_classes=num_classes,
        image_shape=(channels, height, width),
        train=split(train_images[kept], train_labels[kept], training=True),
        validation=split(train_images[held_out], train_labels[held_out]) if len(held_out) else None,
        test=split(arrays.test_images, arrays.test_labels),
    )


def _read(config: DataConfig) -> tuple[Arrays, int, tuple[float, ...], tuple[float, ...], Augmentation]:
    """Arrays, number of classes, mean and deviation in bytes, and augmentation of a data set that fits the device."""
    root = Path(str(config.root)).expanduser()
    if config.name in NAMED:
        known = NAMED[config.name]
        mean, std = tuple(255 * value for value in known.mean), tuple(255 * value for value in known.std)
        return read_named(config.name, root, config.download), known.num_classes, mean, std, known.augmentation
    if config.name == "digits":
        arrays, num_classes = read_digits(), 10
        augmentation = Augmentation(padding=1, flip=False)  # a digit touches the border, and mirrored it is none
    else:
        arrays = _read_npz_file(root)
        num_classes = int(arrays.train_labels.max()) + 1
        check_classes(arrays, num_classes, str(root))
        # A shift of an eighth suits CIFAR's 4 of 32 pixels; whether mirrored images keep their label is not known.
        side = min(arrays.train_images.shape[2:])
        augmentation = Augmentation(padding=max(1, side // 8), flip=False)
    mean, std = channel_statistics(arrays.train_images)
    return arrays, num_classes, mean, std, augmentation


def _read_npz_file(path: Path) -> Arrays:
    if not path.is_file():
        raise FileNotFoundError(f"npz: expected data.root to be a .npz file, got {path}, which is not a file")
    return read_npz(path, str(path))
