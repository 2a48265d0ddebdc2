"""Append-only CSV records of measurements, with the machine in every row, and tables of them in markdown."""

from __future__ import annotations

import csv
import datetime
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from granet.files import write_text_atomically
from granet_kernels.plan_files import processor

RESULTS = Path(__file__).parent / "results"
TIMES = ("ms_median", "ms_p20", "ms_p80")
MACHINE = ("date", "cpu", "torch")

Row = dict[str, Any]


def machine() -> Row:
    """date (UTC), cpu and torch version: the same in all rows of a run."""
    now = datetime.datetime.now(datetime.timezone.utc)
    cpu = f"{processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return {"date": now.strftime("%Y-%m-%dT%H:%M:%SZ"), "cpu": cpu, "torch": torch.__version__}


def append(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Add rows to a CSV file, which is replaced in one piece; floats get six significant digits, None is empty.

    Args:
        path: made, with its folder, if it is missing.
        columns: the header; every row has exactly these keys.
    Raises:
        ValueError: a row has other keys, or the file other columns. The file is as it was.
    """
    text = path.read_text() if path.exists() else ""
    header = ",".join(columns)
    if text and text.splitlines()[0] != header:
        raise ValueError(f"{path}: expected the columns {header}, got {text.splitlines()[0]}: move the file away")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if not text:
        writer.writerow(columns)
    for row in rows:
        if row.keys() != set(columns):
            raise ValueError(f"expected a row with the columns {header}, got {','.join(row)}")
        writer.writerow([_cell(row[name]) for name in columns])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, text + buffer.getvalue())


def load(path: Path, since: str = "") -> list[Row]:
    """The rows of a CSV file whose date is not before `since`; what reads as a number is one, an empty cell is None."""
    with open(path, newline="") as file:
        rows = [{name: _value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    return [row for row in rows if row["date"] >= since]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(share: float) -> str:
    """0.9 -> "90%", 0.995 -> "99.5%"."""
    return f"{100 * share:.4g}%"


def level_of(row: Row) -> str:
    """The sparsity of a row with a blank before it; nothing for dense torch."""
    return "" if row["granularity"] == "dense" else f" {percent(row['sparsity'])}"


def geometric_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """exp of the (weighted) mean of the logarithms; NaN of no values."""
    weights = [1.0] * len(values) if weights is None else weights
    if not sum(weights):
        return math.nan
    return math.exp(sum(w * math.log(v) for v, w in zip(values, weights, strict=True)) / sum(weights))


def unique(values: Iterable[Any]) -> list[Any]:
    """Each value once, in order of appearance."""
    return list(dict.fromkeys(values))


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None
