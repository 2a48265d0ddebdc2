"""The embedded digits: the images of scikit-learn's load_digits, and the division DIGITS-ATTRIBUTION.txt describes."""

from __future__ import annotations

import hashlib
from importlib import resources

import numpy as np
import pytest
import torch

from granet.data import DataConfig, load_data
from granet.data.named import read_digits

FILE = resources.files("granet.data") / "digits.npz"


def test_digits_equal_scikit_learns() -> None:
    expected = pytest.importorskip("sklearn.datasets").load_digits()
    with FILE.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        order = np.argsort(np.concatenate([stored["train_index"], stored["test_index"]]))
        images = np.concatenate([stored["train_images"], stored["test_images"]])[order]
        labels = np.concatenate([stored["train_labels"], stored["test_labels"]])[order]
    np.testing.assert_array_equal(images, expected.images)
    np.testing.assert_array_equal(labels, expected.target)


def test_division_is_the_documented_one() -> None:
    with FILE.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        train, test = stored["train_index"].tolist(), stored["test_index"].tolist()
        positions = train + test
        labels = dict(zip(positions, [*stored["train_labels"], *stored["test_labels"]], strict=True))
    assert sorted(positions) == list(range(1797))
    expected = []
    for digit in range(10):
        of_class = [position for position in range(1797) if labels[position] == digit]
        of_class.sort(key=lambda position: hashlib.sha256(str(position).encode()).digest())
        expected += of_class[: len(of_class) // 5]
    assert test == sorted(expected)
    assert train == sorted(set(range(1797)) - set(expected))


def test_digits_file_is_small_and_comes_with_its_attribution() -> None:
    assert len(FILE.read_bytes()) < 60_000
    text = (resources.files("granet.data") / "DIGITS-ATTRIBUTION.txt").read_text(encoding="utf-8")
    for part in ("Alpaydin", "Kaynak", "1998", "CC BY 4.0", "https://doi.org/10.24432/C50P49", "Changes"):
        assert part in text


def test_arrays_have_sixteen_levels_and_all_classes() -> None:
    digits = read_digits()
    assert digits.train_images.shape == (1442, 1, 8, 8)
    assert digits.test_images.shape == (355, 1, 8, 8)
    assert digits.train_images.dtype == torch.uint8
    assert int(digits.train_images.max()) == 16
    assert digits.test_labels.bincount().min() >= 34
    assert digits.test_labels.bincount().numel() == 10


def test_default_data_set_is_digits_normalised_over_the_training_set() -> None:
    data = load_data(DataConfig(validation=0, augment=False))
    assert (data.num_classes, data.in_channels, data.image_shape) == (10, 1, (1, 8, 8))
    assert data.validation is None
    images, labels = next(data.train.batches(1442))
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert abs(images.mean().item()) < 1e-5
    assert images.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_digits_are_shifted_by_at_most_one_pixel_and_never_mirrored() -> None:
    plain = load_data(DataConfig(augment=False), seed=4).train
    moved = load_data(DataConfig(), seed=4).train
    seen = set()
    for (before, same), (after, labels) in zip(plain.batches(64), moved.batches(64), strict=True):
        assert torch.equal(same, labels)
        for image, result in zip(before, after, strict=True):
            black = image.min().item()
            padded = torch.nn.functional.pad(image, (1, 1, 1, 1), value=black)
            windows = {(y, x): padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)}
            seen |= {shift for shift, window in windows.items() if torch.equal(window, result)}
            assert any(torch.equal(window, result) for window in windows.values())
    assert len(seen) == 9
