"""Folders of images: the same batches with any number of workers, from any batch on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from granet.data import Data, DataConfig, load_data
from granet.data.split import Batch

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """6 training and 2 validation images of each of 3 classes, 30x20 or 20x30 pixels, some of them grey."""
    rng = np.random.RandomState(0)
    for part, examples in (("train", 6), ("val", 2)):
        for name in CLASSES:
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(examples):
                shape = [(20, 30, 3), (30, 20, 3), (20, 30)][i % 3]
                Image.fromarray(rng.randint(0, 256, shape).astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def load(root: Path, seed: int = 0, **options: Any) -> Data:
    config = DataConfig("imagenet", root=str(root), **{"validation": 3, "image_size": 16, **options})
    return load_data(config, seed=seed)


def equal(a: list[Batch], b: list[Batch]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) and torch.equal(u, v) for (x, u), (y, v) in pairs)


def test_splits_and_shapes(root: Path) -> None:
    data = load(root)
    assert data.validation is not None
    assert (data.num_classes, data.image_shape) == (3, (3, 16, 16))
    assert (data.train.examples, data.validation.examples, data.test.examples) == (15, 3, 6)
    images, labels = next(data.train.batches(4))
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    _, labels = next(data.validation.batches(3))
    assert labels.tolist() == [0, 1, 2]  # one of each class
    _, labels = next(data.test.batches(6))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_default_size_is_224(root: Path) -> None:
    assert load(root, image_size=None).image_shape == (3, 224, 224)


def test_batches_do_not_depend_on_workers_start_or_global_generator(root: Path) -> None:
    reference = list(load(root).train.batches(4, epoch=1))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert equal(list(load(root).train.batches(4, epoch=1, start=2)), reference[2:])
    assert equal(list(load(root, workers=2).train.batches(4, epoch=1)), reference)
    assert equal(list(load(root, workers=2).train.batches(4, epoch=1, start=1)), reference[1:])
    assert torch.equal(torch.get_rng_state(), state)


def test_epochs_and_seeds_differ(root: Path) -> None:
    whole = [next(load(root, seed=seed).train.batches(15, epoch=epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(whole[0][0], whole[1][0])
    assert not torch.equal(whole[0][0], whole[2][0])


def test_test_images_are_scaled_cut_at_the_centre_and_normalised(root: Path) -> None:
    images, _ = next(load(root, image_size=14).test.batches(1))  # 16 on the shorter side, then the central 14
    with Image.open(root / "val" / "ant" / "0.png") as file:
        scaled = file.convert("RGB").resize((24, 16), Image.Resampling.BILINEAR)
    pixels = np.asarray(scaled, dtype=np.float64)[1:15, 5:19] / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(images[0].numpy().transpose(1, 2, 0), expected, atol=1e-5)


def test_without_augmentation_an_image_is_the_same_in_every_epoch(root: Path) -> None:
    train = load(root, augment=False).train
    first, second = (next(train.batches(15, epoch=epoch))[0].flatten(1) for epoch in (0, 1))
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_folder_is_named(root: Path, part: str) -> None:
    (root / part).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"expected the folder .*{part}/"):
        load(root)


def test_a_class_without_images_is_named(root: Path) -> None:
    (root / "train" / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match="dog"):
        load(root)


def test_other_classes_in_val_are_named(root: Path) -> None:
    (root / "val" / "cat").rename(root / "val" / "dog")
    with pytest.raises(ValueError, match=r"same classes in train/ and val/, .*\['cat', 'dog'\]"):
        load(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_image_is_named_in_one_line(root: Path, workers: int) -> None:
    path = root / "train" / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged, or not an image") as error:
        list(load(root, workers=workers, validation=0).train.batches(4))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
