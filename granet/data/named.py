"""The small data sets by name: what they hold, and where their files are looked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from granet.data.arrays import Arrays, check_classes, from_numpy, read_npz
from granet.data.memory import Augmentation


@dataclass(frozen=True)
class NamedSet:
    """A published data set.

    Args:
        torchvision_class: name of its class in torchvision.datasets.
        folder: where torchvision keeps its files, under the root.
        npz: names of a `.npz` file with the same images, under the root, in the order they are looked for.
        num_classes: labels lie in [0, num_classes).
        image_shape: (channels, height, width).
        mean: of each channel over the training set, as published, for pixels in [0, 1].
        std: of each channel over the training set, as published, for pixels in [0, 1].
        augmentation: of the training images.
    """

    torchvision_class: str
    folder: str
    npz: tuple[str, ...]
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation


NAMED = {
    "cifar10": NamedSet(
        "CIFAR10",
        "cifar-10-batches-py",
        ("cifar10.npz",),
        10,
        (3, 32, 32),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        Augmentation(padding=4, flip=True),
    ),
    "cifar100": NamedSet(
        "CIFAR100",
        "cifar-100-python",
        ("cifar100.npz",),
        100,
        (3, 32, 32),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        Augmentation(padding=4, flip=True),
    ),
    # Garments fill the 28 pixels, so they move by 2 at most; a mirrored garment is still the same kind.
    "fashion-mnist": NamedSet(
        "FashionMNIST",
        "FashionMNIST/raw",
        ("fashion_mnist.npz", "fashion-mnist.npz"),
        10,
        (1, 28, 28),
        (0.2860,),
        (0.3530,),
        Augmentation(padding=2, flip=True),
    ),
}


def read_digits() -> Arrays:
    """Read the 1,797 handwritten digits of the package (1,442 to train, 355 to test); see DIGITS-ATTRIBUTION.txt."""
    with (resources.files("granet.data") / "digits.npz").open("rb") as file:
        return read_npz(file, "digits.npz")


def read_named(name: str, root: Path, download: bool) -> Arrays:
    """Read a data set of `NAMED`: torchvision's files if they are under `root`, else a `.npz` file, else a download.

    Raises:
        FileNotFoundError: neither is there, and `download` is false.
        ValueError: the files are damaged or hold something else; names the file.
        OSError: the download failed.
    """
    known = NAMED[name]
    folder = root / known.folder
    npz = [root / file for file in known.npz if (root / file).is_file()]
    if folder.is_dir() or (download and not npz):
        arrays, source = _read_torchvision(name, root, download), str(folder)
    elif npz:
        arrays, source = read_npz(npz[0], str(npz[0])), str(npz[0])
    else:
        raise FileNotFoundError(
            f"{name}: neither {folder}/ (torchvision's files) nor {' or '.join(str(root / f) for f in known.npz)} is "
            f"there; set data.root to the folder that holds one of them, or data.download to fetch it"
        )
    if tuple(arrays.train_images.shape[1:]) != known.image_shape:
        raise ValueError(
            f"{source}: expected images of {name}, (channels, height, width) = {known.image_shape}, "
            f"got {tuple(arrays.train_images.shape[1:])}"
        )
    check_classes(arrays, known.num_classes, source)
    return arrays


def _read_torchvision(name: str, root: Path, download: bool) -> Arrays:
    import torchvision  # here, since its import takes seconds that the embedded digits need not pay for

    known = NAMED[name]
    dataset = getattr(torchvision.datasets, known.torchvision_class)
    if download:
        _download(dataset, name, root)
    folder = root / known.folder
    if name == "fashion-mnist":
        return from_numpy(_read_idx_files(folder), str(folder))
    parts: dict[str, npt.NDArray[Any]] = {}
    for part in ("train", "test"):
        try:
            loaded = dataset(str(root), train=part == "train", download=False)
        except RuntimeError as error:
            raise ValueError(_damaged_file(dataset, folder)) from error
        parts[f"{part}_images"] = loaded.data
        parts[f"{part}_labels"] = np.asarray(loaded.targets, dtype=np.int64)
    return from_numpy(parts, str(folder))


def _download(dataset: Any, name: str, root: Path) -> None:
    try:
        dataset(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{name}: the download into {root} failed: {error}") from error


def _damaged_file(dataset: Any, folder: Path) -> str:
    """Say which file made torchvision refuse a CIFAR folder (it only says that there is one)."""
    from torchvision.datasets.utils import check_integrity

    meta = (dataset.meta["filename"], dataset.meta["md5"])
    for file, md5 in (*dataset.train_list, *dataset.test_list, meta):
        if not (folder / file).is_file():
            return f"{folder / file}: missing; set data.download to fetch the data set again"
        if not check_integrity(str(folder / file), md5):
            return f"{folder / file}: damaged (its checksum is not the published one)"
    return f"{folder}: torchvision cannot read it"


def _read_idx_files(folder: Path) -> dict[str, npt.NDArray[Any]]:
    """Read the four files of (Fashion-)MNIST. Not by torchvision, which may load a pickle left by older versions."""
    return {
        "train_images": read_idx(folder / "train-images-idx3-ubyte"),
        "train_labels": read_idx(folder / "train-labels-idx1-ubyte"),
        "test_images": read_idx(folder / "t10k-images-idx3-ubyte"),
        "test_labels": read_idx(folder / "t10k-labels-idx1-ubyte"),
    }


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read a file of bytes in the IDX format: 0, 0, 8, number of dimensions; sizes as big-endian uint32; the bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the header is another one, or the length does not agree with it.
    Source: http://yann.lecun.com/exdb/mnist
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; set data.download to fetch the data set again")
    content = bytearray(path.read_bytes())  # writable, as tensors that share the memory must be
    if len(content) < 4 or content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path}: expected an IDX file of bytes, got one that begins with {bytes(content[:4])!r}")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    expected = int(np.prod(shape, dtype=object))
    if len(content) - start != expected:
        raise ValueError(f"{path}: damaged: expected {expected} bytes for {shape}, got {len(content) - start}")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
