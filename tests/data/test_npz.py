"""Data sets in `.npz` files: what is read, and what is said of files that are damaged or hold something else."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from granet.data import DataConfig, load_data
from granet.data.arrays import channel_statistics, read_npz

Arrays = dict[str, Any]


def make_arrays(shape: tuple[int, ...] = (16, 16, 3), train: int = 40, test: int = 8) -> Arrays:
    rng = np.random.RandomState(0)
    return {
        "train_images": rng.randint(0, 256, (train, *shape)).astype(np.uint8),
        "train_labels": (np.arange(train) % 4).astype(np.uint8),
        "test_images": rng.randint(0, 256, (test, *shape)).astype(np.uint8),
        "test_labels": (np.arange(test) % 4).astype(np.uint8),
    }


def save(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


def load(path: Path, **options: Any) -> Any:
    return load_data(DataConfig("npz", root=str(path), **options))


@pytest.mark.parametrize("shape", [(16, 16, 3), (16, 12, 1), (9, 7)], ids=str)
def test_arrays_are_read_as_channels_first(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = make_arrays(shape)
    data = load(save(tmp_path / "a.npz", arrays), validation=10)
    channels = shape[2] if len(shape) == 3 else 1
    assert data.image_shape == (channels, *shape[:2])
    assert data.num_classes == 4
    assert (data.train.examples, data.validation.examples, data.test.examples) == (30, 10, 8)
    images, labels = next(data.test.batches(8))
    raw = arrays["test_images"].reshape(8, *shape[:2], channels).transpose(0, 3, 1, 2).astype(np.float64)
    train = arrays["train_images"].reshape(-1, channels).astype(np.float64)
    mean, std = train.mean(0), train.std(0)
    expected = (raw - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-5)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_compressed_files_and_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", **make_arrays())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(Path("~/a.npz")).train.examples == 36


def test_channel_statistics_are_exact_and_a_constant_channel_is_not_divided_by_zero() -> None:
    images = torch.zeros(2, 2, 1, 2, dtype=torch.uint8)
    images[:, 0] = torch.tensor([[[1, 2]], [[3, 6]]])
    mean, std = channel_statistics(images)
    assert mean == (3.0, 0.0)
    assert std == (3.5**0.5, 1.0)


BAD_ARRAYS: dict[str, tuple[Arrays, str]] = {
    "float-images": (
        {"train_images": np.zeros((40, 16, 16, 3))},
        r"train_images: expected uint8 .* got float64 \(40, 16, 16, 3\)",
    ),
    "channels-first": (
        {"test_images": np.zeros((8, 3, 16, 16), np.uint8)},
        r"test_images: expected .* 1 or 3 channels",
    ),
    "flat-images": (
        {"train_images": np.zeros((40, 768), np.uint8)},
        r"train_images: expected .* got uint8 \(40, 768\)",
    ),
    "no-images": ({"train_images": np.zeros((0, 16, 16, 3), np.uint8)}, r"train_images: expected"),
    "other-size": ({"test_images": np.zeros((8, 8, 8, 3), np.uint8)}, r"test_images of the shape of train_images"),
    "too-few-labels": ({"train_labels": np.zeros(39, np.uint8)}, r"train_labels: expected integers \(40,\).*\(39,\)"),
    "float-labels": ({"train_labels": np.zeros(40)}, r"train_labels: expected integers .* got float64"),
    "negative-label": ({"train_labels": np.full(40, -1)}, r"train_labels: expected labels counted from 0, got -1"),
    "huge-label": ({"train_labels": np.full(40, 2**63, np.uint64)}, r"train_labels: expected labels counted from 0"),
    "unseen-test-label": ({"test_labels": np.full(8, 4)}, r"test_labels: expected labels from 0 to 3, got 4"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_of_another_kind_are_named(tmp_path: Path, change: Arrays, message: str) -> None:
    path = save(tmp_path / "a.npz", {**make_arrays(), **change})
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(error.value).startswith(str(path))


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    arrays = make_arrays()
    del arrays["test_labels"]
    with pytest.raises(ValueError, match=r"a\.npz: expected the arrays .*test_labels, got train_images"):
        load(save(tmp_path / "a.npz", arrays))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected data\.root to be a \.npz file, got .*nothing\.npz"):
        load(tmp_path / "nothing.npz")
    with pytest.raises(FileNotFoundError, match="which is not a file"):
        load(tmp_path)


class Payload:
    """Unpickling this would leave a mark."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize("kind", ["object-array", "plain-pickle", "member-pickle"])
def test_pickles_are_refused_and_never_loaded(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.npz"
    if kind == "plain-pickle":
        path.write_bytes(pickle.dumps(Payload()))
    else:
        images = np.array([Payload()], dtype=object)
        changed = "train_images" if kind == "object-array" else "test_labels"
        save(path, {**make_arrays(), changed: images})
    with pytest.raises(ValueError, match=r"a\.npz: damaged, or not a \.npz file of plain arrays"):
        load(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x03\x04" + b"\0" * 40, b"not an archive at all"], ids=["empty", "two", "zeros", "text"]
)
def test_foreign_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: damaged, or not a \.npz file"):
        load(path)


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz: expected the arrays train_images, .*, got none"):
        load(path)


def test_members_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for key in make_arrays():
            archive.writestr(key, "text")
    with pytest.raises(ValueError, match=r"a\.npz: expected the arrays train_images, .*, got none"):
        load(path)


def packed(compress: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **make_arrays((4, 4), train=8, test=4))
    return buffer.getvalue()


PACKED = {compress: packed(compress) for compress in (False, True)}


@given(compress=st.booleans(), share=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(compress: bool, share: float) -> None:
    content = PACKED[compress]
    with pytest.raises(ValueError, match=r"^file: "):
        read_npz(io.BytesIO(content[: int(share * len(content))]), "file")


@given(compress=st.booleans(), share=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_nothing(compress: bool, share: float, flip: int) -> None:
    content = bytearray(PACKED[compress])
    content[int(share * len(content))] ^= flip
    whole = read_npz(io.BytesIO(PACKED[compress]), "file")
    with contextlib.suppress(ValueError):
        read = read_npz(io.BytesIO(bytes(content)), "file")  # e.g. with another date in the archive's directory
        assert all(torch.equal(value, getattr(read, key)) for key, value in vars(whole).items())
