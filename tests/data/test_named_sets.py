"""CIFAR and Fashion-MNIST: where their files are looked for, and what is said when they are not as they should be."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
import pytest
import torchvision

from granet.data import DataConfig, load_data
from granet.data.named import NAMED, read_idx

Bytes = npt.NDArray[np.uint8]


def images_of(name: str, examples: int, seed: int = 0) -> tuple[Bytes, Bytes]:
    channels, height, width = NAMED[name].image_shape
    shape = (examples, height, width, channels) if channels > 1 else (examples, height, width)
    images = np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)
    return images, (np.arange(examples) % NAMED[name].num_classes).astype(np.uint8)


def write_npz(path: Path, name: str, examples: int = 20) -> None:
    images, labels = images_of(name, examples)
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:5], test_labels=labels[:5])


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "cifar10") -> Path:
    """Write a tiny CIFAR in torchvision's form and let torchvision expect its checksums."""
    dataset: Any = getattr(torchvision.datasets, NAMED[name].torchvision_class)
    folder = root / NAMED[name].folder
    folder.mkdir()
    key = dataset.meta["key"]
    labels_key = "labels" if name == "cifar10" else "fine_labels"

    def write(file: str, content: object) -> list[str]:
        blob = pickle.dumps(content)
        (folder / file).write_bytes(blob)
        return [file, hashlib.md5(blob).hexdigest()]

    images, labels = images_of(name, 10)
    batch = {"data": images.transpose(0, 3, 1, 2).reshape(10, -1), labels_key: labels.tolist()}
    names = [str(label) for label in range(NAMED[name].num_classes)]
    monkeypatch.setattr(dataset, "train_list", [write(file, batch) for file, _ in dataset.train_list])
    monkeypatch.setattr(dataset, "test_list", [write(file, batch) for file, _ in dataset.test_list])
    meta_file, md5 = write(dataset.meta["filename"], {key: names})
    monkeypatch.setattr(dataset, "meta", {"filename": meta_file, "key": key, "md5": md5})
    return folder


def idx(array: Bytes) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_fashion(root: Path) -> Path:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, examples in (("train", 20), ("t10k", 5)):
        images, labels = images_of("fashion-mnist", examples)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def load(name: str, root: Path, **options: Any) -> Any:
    return load_data(DataConfig(name, root=str(root), **{"validation": 0, "augment": False, **options}))


def first_test_images(data: Any, name: str) -> Bytes:
    images, _ = next(data.test.batches(5))
    mean, std = (np.array(values)[:, None, None] for values in (NAMED[name].mean, NAMED[name].std))
    raw: Bytes = np.rint((images.numpy() * std + mean) * 255).astype(np.uint8)
    return raw


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cifar10", "cifar10.npz"),
        ("cifar100", "cifar100.npz"),
        ("fashion-mnist", "fashion_mnist.npz"),
        ("fashion-mnist", "fashion-mnist.npz"),
    ],
)
def test_npz_under_the_root_is_read(tmp_path: Path, name: str, file: str) -> None:
    write_npz(tmp_path / file, name)
    data = load(name, tmp_path)
    assert data.num_classes == NAMED[name].num_classes
    assert data.image_shape == NAMED[name].image_shape
    expected = images_of(name, 20)[0][:5].reshape(5, *data.image_shape[1:], -1).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(first_test_images(data, name), expected)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvisions_cifar_comes_before_the_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_npz(tmp_path / NAMED[name].npz[0], name)
    write_cifar(tmp_path, monkeypatch, name)
    data = load(name, tmp_path)
    dataset: Any = getattr(torchvision.datasets, NAMED[name].torchvision_class)
    assert data.train.examples == 10 * len(dataset.train_list)
    expected = images_of(name, 10)[0][:5].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(first_test_images(data, name), expected)


def test_torchvisions_fashion_mnist_is_read(tmp_path: Path) -> None:
    write_fashion(tmp_path)
    data = load("fashion-mnist", tmp_path)
    assert (data.train.examples, data.test.examples) == (20, 5)
    expected = images_of("fashion-mnist", 5)[0][:, None]
    np.testing.assert_array_equal(first_test_images(data, "fashion-mnist"), expected)


@pytest.mark.parametrize("name", NAMED)
def test_nothing_there_says_what_was_looked_for_and_how_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load(name, tmp_path / "nowhere")
    for part in (name, NAMED[name].folder, *NAMED[name].npz, str(tmp_path / "nowhere"), "data.root", "data.download"):
        assert part in str(error.value)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("damage", ["changed", "missing"])
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_cifar_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, damage: str) -> None:
    path = write_cifar(tmp_path, monkeypatch) / file
    if damage == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    else:
        path.unlink()
    with pytest.raises(ValueError, match=f"{file}: (damaged|missing)") as error:
        load("cifar10", tmp_path)
    assert str(path) in str(error.value)


def test_missing_fashion_mnist_file_is_named(tmp_path: Path) -> None:
    (write_fashion(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte: missing"):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], r"damaged: expected 60 bytes for \[3, 4, 5\], got 59"),
        (lambda content: content + b"\0", r"expected 60 bytes for \[3, 4, 5\], got 61"),
        (lambda content: b"\0\0\x0d" + content[3:], "expected an IDX file of bytes, got one that begins with"),
        (lambda content: content[:6], "expected an IDX file of bytes"),
        (lambda content: b"", "expected an IDX file of bytes"),
        (lambda content: content[:4] + b"\xff" * 12 + content[16:], "damaged: expected 79228162458924105385300197375"),
    ],
    ids=["truncated", "longer", "other-type", "header-only", "empty", "absurd-sizes"],
)
def test_damaged_idx_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "images"
    array = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    path.write_bytes(idx(array))
    np.testing.assert_array_equal(read_idx(path), array)
    path.write_bytes(damage(idx(array)))
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path)
    assert str(error.value).startswith(str(path))


def test_another_sets_images_or_labels_are_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "cifar10.npz", "fashion-mnist")
    with pytest.raises(
        ValueError, match=r"cifar10\.npz: expected images of cifar10, .*\(3, 32, 32\), got \(1, 28, 28\)"
    ):
        load("cifar10", tmp_path)
    write_npz(tmp_path / "cifar10.npz", "cifar100")
    with pytest.raises(ValueError, match=r"cifar10\.npz: train_labels: expected labels from 0 to 9, got 19"):
        load("cifar10", tmp_path)


class FetchedError(Exception):
    """The download began."""


def no_network(*args: object, **kwargs: object) -> None:
    raise FetchedError


@pytest.mark.parametrize("name", NAMED)
def test_download_only_if_asked_and_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    dataset = getattr(torchvision.datasets, NAMED[name].torchvision_class)
    monkeypatch.setattr(dataset, "download", no_network)
    with pytest.raises(FileNotFoundError):
        load(name, tmp_path)
    with pytest.raises(FetchedError):
        load(name, tmp_path, download=True)
    write_npz(tmp_path / NAMED[name].npz[0], name)
    assert load(name, tmp_path, download=True).train.examples == 20


@pytest.mark.parametrize("failure", [URLError("no route"), RuntimeError("File not found or corrupted.")], ids=repr)
def test_failed_download_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def fail(self: object) -> None:
        raise failure

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    with pytest.raises(OSError, match=r"cifar10: the download into .* failed: .*(no route|corrupted)"):
        load("cifar10", tmp_path, download=True)


def test_cifar_is_cropped_by_four_and_mirrored(tmp_path: Path) -> None:
    write_npz(tmp_path / "cifar10.npz", "cifar10")
    augmentation = load("cifar10", tmp_path, augment=True).train.augmentation
    assert (augmentation.padding, augmentation.flip) == (4, True)
    assert load("cifar10", tmp_path, augment=False).train.augmentation is None
    assert load("cifar10", tmp_path, augment=True).test.augmentation is None
