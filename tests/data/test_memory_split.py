"""Splits in memory: the same seed gives the same batches; crops and flips, worked by hand."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from granet.data.memory import Augmentation, MemorySplit, crop_flip
from granet.data.seeds import derive_seed, generator
from granet.data.split import Batch


def make_split(
    examples: int = 23, seed: int = 0, augmentation: Augmentation | None = None, shuffle: bool = True
) -> MemorySplit:
    images = torch.randint(0, 256, (examples, 3, 6, 5), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return MemorySplit(images, torch.arange(examples), (1.0, 2.0, 3.0), (2.0, 4.0, 8.0), shuffle, seed, augmentation)


def equal(a: list[Batch], b: list[Batch]) -> bool:
    pairs = zip(a, b, strict=True)
    return all(torch.equal(x, y) and torch.equal(u, v) for (x, u), (y, v) in pairs)


CROP = Augmentation(padding=2, flip=True)


@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
@pytest.mark.parametrize("augmentation", [None, CROP], ids=["plain", "augmented"])
def test_every_tail_of_an_epoch_is_the_same_bits(batch_size: int, augmentation: Augmentation | None) -> None:
    split = make_split(augmentation=augmentation)
    whole = list(split.batches(batch_size, epoch=3))
    assert len(whole) == split.steps_per_epoch(batch_size)
    for start in range(len(whole) + 1):
        assert equal(list(split.batches(batch_size, epoch=3, start=start)), whole[start:])


def test_an_epoch_holds_every_example_once_and_keeps_the_last_partial_batch() -> None:
    batches = list(make_split().batches(5, epoch=1))
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(23))


def test_batches_follow_seed_and_epoch_and_not_the_global_generator() -> None:
    reference = list(make_split(seed=1, augmentation=CROP).batches(8, epoch=2))
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert equal(list(make_split(seed=1, augmentation=CROP).batches(8, epoch=2)), reference)
    torch.set_rng_state(state)
    labels = {
        tuple(torch.cat([y for _, y in make_split(seed=seed).batches(8, epoch=epoch)]).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(labels) == 9


def test_reading_batches_leaves_the_global_generator_and_the_images_alone() -> None:
    split = make_split(augmentation=CROP)
    images, state = split.images.clone(), torch.get_rng_state()
    list(split.batches(8))
    assert torch.equal(split.images, images)
    assert torch.equal(torch.get_rng_state(), state)


def test_unshuffled_split_keeps_the_order_and_normalises() -> None:
    split = make_split(shuffle=False)
    images, labels = next(split.batches(4, epoch=5))
    assert labels.tolist() == [0, 1, 2, 3]
    raw = split.images[:4].double()
    expected = torch.stack([(raw[:, 0] - 1) / 2, (raw[:, 1] - 2) / 4, (raw[:, 2] - 3) / 8], dim=1)
    torch.testing.assert_close(images, expected.float())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1, got 0"),
        ({"batch_size": 5, "epoch": -1}, "epoch >= 0, got -1"),
        ({"batch_size": 5, "start": 6}, "0 <= start <= 5 .*got 6"),
        ({"batch_size": 5, "start": -1}, "got -1"),
    ],
    ids=["batch-size", "epoch", "start-beyond", "start-negative"],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_split().batches(**arguments)


def test_crop_flip_by_hand() -> None:
    image = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]], dtype=torch.uint8).expand(4, 1, 3, 3)
    down, right = torch.tensor([1, 0, 2, 1]), torch.tensor([1, 0, 1, 2])
    result = crop_flip(image, 1, down, right, torch.tensor([False, False, False, True]))
    assert result[:, 0].tolist() == [
        [[1, 2, 3], [4, 5, 6], [7, 8, 9]],  # in place
        [[0, 0, 0], [0, 1, 2], [0, 4, 5]],  # the window up and to the left
        [[4, 5, 6], [7, 8, 9], [0, 0, 0]],  # the window down
        [[0, 3, 2], [0, 6, 5], [0, 9, 8]],  # the window to the right, mirrored
    ]


def crop_flip_one(image: Tensor, padding: int, down: int, right: int, flip: bool) -> Tensor:
    _, height, width = image.shape
    window = torch.nn.functional.pad(image, (padding,) * 4)[:, down : down + height, right : right + width]
    return window.flip(2) if flip else window


@given(
    batch=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_crop_flip_equals_one_image_at_a_time(
    batch: int, channels: int, height: int, width: int, padding: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, channels, height, width), generator=rng, dtype=torch.uint8)
    down, right = torch.randint(0, 2 * padding + 1, (2, batch), generator=rng)
    flip = torch.randint(0, 2, (batch,), generator=rng).bool()
    expected = [crop_flip_one(images[i], padding, int(down[i]), int(right[i]), bool(flip[i])) for i in range(batch)]
    assert torch.equal(crop_flip(images, padding, down, right, flip), torch.stack(expected))


def test_shifts_and_flips_are_drawn_evenly() -> None:
    image = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).repeat(900, 1, 1, 1)
    split = MemorySplit(image, torch.zeros(900, dtype=torch.int64), (0.0,), (1.0,), True, 0, Augmentation(1, True))
    images, _ = next(split.batches(900))
    centres = Counter(zip(images[:, 0, 2, 2].tolist(), (images[:, 0, 2, 1] < images[:, 0, 2, 3]).tolist(), strict=True))
    assert len(centres) == 9 * 2  # 9 shifts, mirrored or not
    assert min(centres.values()) > 25  # 50 expected


def test_derived_seed_is_the_documented_hash() -> None:
    digest = hashlib.sha256(b"augment:1:2:3").digest()
    assert derive_seed("augment", 1, 2, 3) == int.from_bytes(digest[:8], "little") % 2**63
    assert derive_seed("augment", 12, 3) != derive_seed("augment", 1, 23)
    assert generator("order", 5).initial_seed() == derive_seed("order", 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_the_same_on_cuda() -> None:
    split = make_split(augmentation=CROP)
    moved = MemorySplit(
        split.images.cuda(), split.labels.cuda(), (1.0, 2.0, 3.0), (2.0, 4.0, 8.0), True, 0, augmentation=CROP
    )
    for (x, u), (y, v) in zip(split.batches(8), moved.batches(8), strict=True):
        assert y.is_cuda
        torch.testing.assert_close(y.cpu(), x)
        assert torch.equal(v.cpu(), u)
