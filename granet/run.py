"""The run folder: configuration, metrics, weights, masks, per-layer table and summary of one training run."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from granet.checkpoint import CheckpointError, find_checkpoint
from granet.config import TrainConfig, config_dict, config_yaml, differences
from granet.files import write_atomically, write_text_atomically
from granet.options import load_config

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

# What a resumed run may be given anew: where and how it runs. (Another device or number of threads rounds differently.)
_FREE = ("device", "threads", "plan", "checkpoint_every", "log", "data.root", "data.download", "data.workers")

LAST, BEST = "model", "best"  # names of weights: LAST.safetensors and LAST-masks.safetensors

COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "lr",
    "sparsity",
    "nnz",
    "test_flops_ratio",
    "train_flops_ratio",
    "images_per_second",
    "native_share",
    "seconds",
)
TIME_COLUMNS = ("images_per_second", "native_share", "seconds")  # what depends on the clock, if the plan does

Row = dict[str, Any]


def new_run_folder(config: TrainConfig, parent: Path = Path("runs")) -> RunFolder:
    """Make a folder that no other run has, named after date, time, model, data set and method."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    base = f"{stamp}-{config.model.replace('/', '-')}-{config.data.name}-{type(config.method).__name__.lower()}"
    path, number = parent / base, 1
    while True:
        try:
            path.mkdir(parents=True)
            return RunFolder(path)
        except FileExistsError:
            number += 1
            path = parent / f"{base}-{number}"


def check_resumable(saved: dict[str, Any], config: TrainConfig, source: Path) -> None:
    """Raise if `config` differs from the saved config_dict in anything that changes the results.

    Raises:
        CheckpointError: the message lists what differs.
    """
    changed = [line for line in differences(saved, config_dict(config)) if line.partition(":")[0] not in _FREE]
    if changed:
        raise CheckpointError(f"cannot resume {source} with another configuration; it differs in {'; '.join(changed)}")


class RunFolder:
    """The files of one run. Each is written whole or not at all.

    Args:
        path: the folder; made by `create` where it does not exist.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def config_path(self) -> Path:
        """The configuration, as YAML."""
        return self.path / "config.yaml"

    @property
    def summary_path(self) -> Path:
        """The results; there once the run has finished."""
        return self.path / "summary.json"

    def check(self, config: TrainConfig, resume: bool) -> None:
        """Raise if the folder is not free for a new run, or does not hold the run to resume. Changes nothing.

        Raises:
            FileExistsError: the folder holds a run and resume is false.
            FileNotFoundError: resume is true and the folder holds no run.
            CheckpointError: the folder's run has another configuration.
        """
        if resume:
            check_resumable(config_dict(self.load_config()), config, self.path)
        elif self.config_path.exists() or find_checkpoint(self.path) is not None:
            raise FileExistsError(
                f"{self.path} already holds a run; add --resume to continue it, or name another folder"
            )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training in this folder, which is made where it does not exist.

        Raises:
            FileExistsError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:  # no such locks on this system
            yield
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise FileExistsError(f"another process is training in {self.path}") from None
        finally:
            os.close(descriptor)

    def create(self, config: TrainConfig) -> None:
        """Write the configuration into the folder, which is then a run's."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.config_path, config_yaml(config))

    def load_config(self) -> TrainConfig:
        """The configuration that the run was started with.

        Raises:
            FileNotFoundError: the folder holds no run.
        """
        if not self.config_path.is_file():
            raise FileNotFoundError(f"no run in {self.path}: it has no {self.config_path.name}")
        return load_config(self.config_path)

    def write_metrics(self, rows: list[Row]) -> None:
        """Write metrics.jsonl and metrics.csv, one row per epoch."""
        lines = "".join(json.dumps({name: row[name] for name in COLUMNS}) + "\n" for row in rows)
        write_text_atomically(self.path / "metrics.jsonl", lines)
        write_text_atomically(self.path / "metrics.csv", table_csv(rows, COLUMNS))

    def load_metrics(self) -> list[Row]:
        """The rows of metrics.jsonl; none before the first epoch's end."""
        path = self.path / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write_weights(self, name: str, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Write a state_dict as safetensors with the keys of the dense model."""
        write_weights(self.path / name, state, metadata)

    def load_weights(self, name: str) -> dict[str, Tensor]:
        """Read what write_weights wrote.

        Raises:
            FileNotFoundError: the run has not got so far.
            CheckpointError: the file is damaged.
        """
        return load_weights(self.path / name)

    def write_masks(self, name: str, masks: dict[str, Tensor]) -> None:
        """Write masks, eight positions a byte: a kept weight may be zero, so the weights do not tell."""
        packed = {layer: torch.from_numpy(np.packbits(mask.cpu().numpy())) for layer, mask in masks.items()}
        shapes = {layer: list(mask.shape) for layer, mask in masks.items()}
        self.write_weights(name, packed, {"shapes": json.dumps(shapes)})

    def load_masks(self, name: str) -> dict[str, Tensor]:
        """The masks by layer: bool, of the weight's shape, True = kept. Raises as load_weights."""
        packed = self.load_weights(name)
        with safetensors.safe_open(self.path / name, "pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
        masks = {}
        for layer, shape in shapes.items():
            bits = np.unpackbits(packed[layer].numpy(), count=math.prod(shape))
            masks[layer] = torch.from_numpy(bits.astype(bool)).view(shape)
        return masks

    def write_layers(self, table: list[Row]) -> None:
        """Write the per-layer sparsity table as layers.csv."""
        write_text_atomically(self.path / "layers.csv", table_csv(table, tuple(table[0])))

    def load_layers(self) -> list[dict[str, str]]:
        """The rows of layers.csv, as text."""
        with open(self.path / "layers.csv", newline="") as file:
            return list(csv.DictReader(file))

    def write_summary(self, summary: Row) -> None:
        """Write summary.json, the last file of a run."""
        write_text_atomically(self.summary_path, json.dumps(summary, indent=2) + "\n")

    def load_summary(self) -> Row | None:
        """The results of a finished run, else None."""
        if not self.summary_path.exists():
            return None
        try:
            summary: Row = json.loads(self.summary_path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{self.summary_path} is damaged ({error}): delete it and resume the run") from None
        return summary


def table_csv(rows: list[Row], columns: tuple[str, ...]) -> str:
    """Rows as comma-separated values with a header line; None becomes an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_weights(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as a safetensors file; tied tensors are written once under each name."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    data = safetensors.torch.save(copies, metadata)
    write_atomically(path, lambda file: file.write(data))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged.
    """
    if not path.is_file():
        reason = "the run has not come so far, or had no validation to choose the best weights by"
        raise FileNotFoundError(f"no weights at {path}: {reason}")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"weights {path} are damaged ({error})") from error
