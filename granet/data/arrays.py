"""Data sets as arrays in a `.npz` file, checked before anything uses them.

The file holds `train_images`, `train_labels`, `test_images`, `test_labels`: images uint8 (examples, height, width) or
(examples, height, width, channels) with 1 or 3 channels, labels of any integer type, counted from 0.
"""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
_MAX_LABEL = 2**31 - 1
# What numpy and zipfile raise on truncated, overwritten or foreign files.
_DAMAGE = (
    ValueError,
    KeyError,
    EOFError,
    OSError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
)


@dataclass(frozen=True)
class Arrays:
    """Training and test images (examples, channels, height, width) uint8 and labels (examples,) int64, on the CPU."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_npz(file: Path | IO[bytes], name: str) -> Arrays:
    """Read and check the four arrays of a `.npz` file. Pickled objects are refused, never loaded.

    Args:
        file: path, or an open binary file.
        name: of the file in errors.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its arrays are not what this module's text says.
    """
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return read_npz(opened, name)
    arrays = _load(file, name)
    missing = [key for key in _KEYS if key not in arrays]
    if missing:
        got = ", ".join(arrays) or "none"
        raise ValueError(f"{name}: expected the arrays {', '.join(_KEYS)}, got {got}")
    return from_numpy(arrays, name)


def _load(file: IO[bytes], name: str) -> dict[str, npt.NDArray[Any]]:
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {}  # a .npy file: an array without a name
        with loaded:
            found = {key: loaded[key] for key in _KEYS if key in loaded.files}
            # A member that is not in numpy's format comes as bytes.
            return {key: array for key, array in found.items() if isinstance(array, np.ndarray)}
    except _DAMAGE as error:
        raise ValueError(f"{name}: damaged, or not a .npz file of plain arrays ({error})") from error


def from_numpy(arrays: dict[str, npt.NDArray[Any]], name: str) -> Arrays:
    """Check four arrays with the keys of a `.npz` file and bring them into the form of `Arrays`.

    Raises:
        ValueError: wrong shape or type, different numbers of images and labels, or labels below 0; names the array.
    """
    train = _images(arrays["train_images"], f"{name}: train_images")
    test = _images(arrays["test_images"], f"{name}: test_images")
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"{name}: expected test_images of the shape of train_images, (channels, height, width) = "
            f"{tuple(train.shape[1:])}, got {tuple(test.shape[1:])}"
        )
    train_labels = _labels(arrays["train_labels"], len(train), f"{name}: train_labels")
    test_labels = _labels(arrays["test_labels"], len(test), f"{name}: test_labels")
    return Arrays(train, train_labels, test, test_labels)


def check_classes(arrays: Arrays, num_classes: int, name: str) -> None:
    """Raise ValueError unless all labels lie in [0, num_classes)."""
    for key, labels in (("train_labels", arrays.train_labels), ("test_labels", arrays.test_labels)):
        if int(labels.max()) >= num_classes:
            raise ValueError(f"{name}: {key}: expected labels from 0 to {num_classes - 1}, got {int(labels.max())}")


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (examples, channels, height, width) uint8 images, in bytes.

    From exact integer sums, so that they do not depend on the machine. A channel of one constant gets 1 as deviation.
    """
    means, deviations = [], []
    for channel in range(images.shape[1]):
        chunks = images[:, channel].split(4096)  # bincount takes 8 bytes a pixel
        counts = torch.stack([torch.bincount(chunk.flatten(), minlength=256) for chunk in chunks]).sum(0)
        pairs = list(enumerate(counts.tolist()))
        number = sum(count for _, count in pairs)
        total = sum(value * count for value, count in pairs)
        squares = sum(value * value * count for value, count in pairs)
        means.append(total / number)
        deviations.append(((number * squares - total * total) / number**2) ** 0.5 or 1.0)
    return tuple(means), tuple(deviations)


def _images(images: npt.NDArray[Any], what: str) -> Tensor:
    expected = "uint8 (examples, height, width) or (examples, height, width, channels) with 1 or 3 channels"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.size == 0:
        raise ValueError(f"{what}: expected {expected}, got {images.dtype} {images.shape}")
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[3] not in (1, 3):
        raise ValueError(f"{what}: expected {expected}, got {images.dtype} {images.shape}")
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _labels(labels: npt.NDArray[Any], examples: int, what: str) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (examples,):
        raise ValueError(
            f"{what}: expected integers ({examples},), one for each image, got {labels.dtype} {labels.shape}"
        )
    if labels.min() < 0 or labels.max() > _MAX_LABEL:
        raise ValueError(f"{what}: expected labels counted from 0, got {labels.min()} to {labels.max()}")
    return torch.from_numpy(labels.astype(np.int64))
