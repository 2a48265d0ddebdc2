"""Checkpoints: written atomically, checked before they are read, and never able to run code."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from granet.files import sync_folder, write_atomically

NAME = "checkpoint.pt"
PREVIOUS_NAME = "checkpoint-previous.pt"


class CheckpointError(ValueError):
    """A checkpoint is damaged, or does not belong to what it should be loaded into."""


class _Recorder:
    """A binary file for torch.save that remembers the OSError which torch reports as something else."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(state: dict[str, Any], file: BinaryIO) -> None:
    recorder = _Recorder(file)
    try:
        torch.save(state, recorder)  # type: ignore[arg-type]
    except (OSError, RuntimeError):
        if recorder.error is not None:
            raise recorder.error from None
        raise


def save_checkpoint(folder: Path, state: dict[str, Any]) -> Path:
    """Write `state` as the folder's checkpoint.pt; the one before becomes checkpoint-previous.pt.

    Args:
        folder: exists.
        state: tensors, numbers, strings, lists and dicts only.
    Raises:
        OSError: it cannot be written; the checkpoints that were there are as they were.
    """
    path, incoming = folder / NAME, folder / "checkpoint-incoming.pt"
    write_atomically(incoming, lambda file: _save(state, file))
    if path.exists():
        os.replace(path, folder / PREVIOUS_NAME)
    os.replace(incoming, path)
    sync_folder(folder)
    return path


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of the folder, or None.

    A process killed between the renames of save_checkpoint leaves no checkpoint.pt; then the previous one
    is the newest.
    """
    for name in (NAME, PREVIOUS_NAME):
        if (folder / name).exists():
            return folder / name
    return None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after checking every byte of it against the checksums of its archive.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, or holds anything but plain data.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"its part {damaged!r} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise CheckpointError(f"expected a dict, got {type(state).__name__}")
    except OSError:
        raise
    except Exception as error:  # zipfile, zlib, pickle and torch each have their own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged or not a checkpoint ({reason}){_advice(path)}") from error
    return state


def _advice(path: Path) -> str:
    previous = path.with_name(PREVIOUS_NAME)
    if path.name == NAME and previous.exists():
        return f"; the previous one is {previous}: delete the damaged file to resume from it"
    return ""
