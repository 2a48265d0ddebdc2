"""The metrics as TensorBoard events, for those who ask for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def row_writer(logs: list[str], folder: Path) -> Callable[[dict[str, Any]], None]:
    """A function that takes each epoch's row of the metrics; it does nothing unless `logs` names tensorboard.

    Raises:
        ValueError: the tensorboard package is asked for and not installed.
    """
    if "tensorboard" not in logs:
        return lambda row: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("log: tensorboard is not installed; pip install 'granet[tensorboard]'") from None

    writers: list[SummaryWriter] = []

    def write(row: dict[str, Any]) -> None:
        if not writers:  # a resumed run drops what it is about to write again
            writers.append(SummaryWriter(str(folder / "tensorboard"), purge_step=row["epoch"]))
        for name, value in row.items():
            if name != "epoch" and value is not None:
                writers[0].add_scalar(name, value, row["epoch"])
        writers[0].flush()

    return write
