"""What the command lines share: options, the run they describe, and how a measurement becomes a row."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.records import Row, append, machine
from granet.granularity import parse
from granet.models import create_model


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options of every command, `python -m bench.NAME`."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description, allow_abbrev=False)
    made.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="append the records here, not in bench/results; pictures go beside it",
    )
    made.add_argument("--threads", type=positive, metavar="N", help="torch's threads; default: torch's choice")
    made.add_argument(
        "--rounds",
        type=positive,
        default=15,
        metavar="N",
        help="times that each candidate is timed, at most (default 15)",
    )
    made.add_argument(
        "--seconds", type=float, metavar="S", help="time for the whole command, kept by fewer rounds, but 3 at least"
    )
    return made


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


def sparsity(text: str) -> float:
    """A number in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a sparsity in [0, 1), got {text!r}")
    return value


def model(text: str) -> str:
    """The name of a model."""
    try:
        with torch.device("meta"):
            create_model(text, 10)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def layers(text: str) -> str:
    """A model, or "linear"."""
    return text if text == "linear" else model(text)


def granularity(text: str) -> str:
    """What granet.sparsify takes."""
    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


@dataclass
class Record:
    """The rows of one run of a command: printed problems, a CSV that grows case by case, the summary at the end."""

    path: Path
    columns: Sequence[str]
    machine: Row = field(default_factory=machine)
    rows: list[Row] = field(default_factory=list)
    refusals: int = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Complete the rows with machine and threads, and append them to the file."""
        complete = [{**row, "threads": torch.get_num_threads(), **self.machine} for row in rows]
        append(self.path, self.columns, complete)
        self.rows += complete

    def refuse(self, what: str, error: Exception) -> None:
        """Say that no time is reported."""
        self.refusals += 1
        print(f"REFUSED {what}: {error}", file=sys.stderr, flush=True)

    def finish(self, summary: Callable[[list[Row]], str]) -> int:
        """Print the summary; the exit status: 1 if a result was wrong."""
        print(f"\n{self.machine['cpu']}, torch {self.machine['torch']}, {torch.get_num_threads()} threads\n")
        print(summary(self.rows), flush=True)
        return 1 if self.refusals else 0
