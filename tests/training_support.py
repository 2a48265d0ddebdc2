"""Small training runs, and the comparison of two that must have ended the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from granet.checkpoint import NAME, load_checkpoint
from granet.config import AdamW, Cosine, TrainConfig
from granet.data import DataConfig
from granet.methods import GraNet
from granet.run import TIME_COLUMNS

TIMES = ("epoch_seconds", "train_seconds", "seconds", "images_per_second", "native_share")


def small_config(**changes: Any) -> TrainConfig:
    """Two epochs of GraNet on an MLP: 12 steps, an update every second one."""
    config = TrainConfig(
        model="mlp",
        data=DataConfig(name="digits", validation=0.1),
        method=GraNet(initial_sparsity=0.2, sparsity=0.8, update_every=2, prune_until=0.5, regrow_ratio=0.3),
        optimizer=AdamW(lr=0.01),
        lr_schedule=Cosine(warmup=0.1),
        epochs=2,
        batch_size=256,
        threads=1,
        device="cpu",
    )
    return dataclasses.replace(config, **changes)


def without_times(value: Any) -> Any:
    """The same nested data without the entries that a clock decides."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return value


def same(first: Any, second: Any) -> bool:
    """Whether nested data are equal, tensors to the bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def assert_same_end(folder: Path, other: Path) -> None:
    """Weights, masks, optimizer, random state and metrics of two finished runs are equal to the bit."""
    for name in ("model.safetensors", "model-masks.safetensors", "layers.csv"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    states = [without_times(load_checkpoint(path / NAME)) for path in (folder, other)]
    for key in states[0]:
        if key != "config":
            assert same(states[0][key], states[1][key]), key
    assert metrics(folder) == metrics(other)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the time columns."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIME_COLUMNS} for row in rows]
