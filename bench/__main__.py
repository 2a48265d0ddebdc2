"""Every benchmark in one go, in under 20 minutes on two cores; the tables at the end are markdown for a README."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import layers, split, step_time, topk
from bench.options import positive
from bench.peers import DENSE
from bench.records import RESULTS, Row, load, machine

LEVELS = ["--sparsity", "0.9", "0.95", "0.98"]
BREAK_EVEN = ["--directions", "all", "--sparsity", "0.5", "0.7", "--implementations", *DENSE, "granet", "granet-native"]
EVEN = ["--sparsity", "0", "0.25", "0.5", "0.7", "0.99", "--implementations", *DENSE, "granet"]
# A dense step of ResNet-50 takes 9 to 12 s, and every model takes six steps at least.
SLOW_MODEL = ["--implementations", *DENSE, "granet-native", "--rounds", "3"]


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        share: of the time of all stages.
        command: arguments of python; "{seconds}" stands for the time that it has.
    """

    name: str
    share: float
    command: Sequence[str]


RESNET50 = ["--layers", "resnet50-cifar", "--directions", "all", "--implementations", *DENSE, "granet", "granet-native"]
STAGES = (
    Stage("ops", 0.06, ["-m", "pytest", "-q", "bench/test_ops.py", "bench/test_other_ops.py", "--benchmark-only"]),
    Stage("selection", 0.05, ["-m", "bench.topk", "--seconds", "{seconds}"]),
    Stage(
        "layers of VGG-19, and Linear",
        0.24,
        ["-m", "bench.layers", "--layers", "vgg19", "linear", *LEVELS, "--seconds", "{seconds}"],
    ),
    Stage(
        "the same where sparse begins to win",
        0.07,
        ["-m", "bench.layers", "--layers", "vgg19", "linear", *BREAK_EVEN, "--seconds", "{seconds}"],
    ),
    Stage("layers of ResNet-50", 0.14, ["-m", "bench.layers", *RESNET50, *LEVELS, "--seconds", "{seconds}"]),
    Stage("split of a step", 0.05, ["-m", "bench.step_time", "--model", "vgg19", "--split", "--rounds", "3", *LEVELS]),
    Stage("step of VGG-19", 0.11, ["-m", "bench.step_time", "--model", "vgg19", *LEVELS, "--seconds", "{seconds}"]),
    Stage(
        "the same at every other sparsity",
        0.11,
        ["-m", "bench.step_time", "--model", "vgg19", *EVEN, "--seconds", "{seconds}"],
    ),
    Stage(
        "step of ResNet-50",
        0.17,
        ["-m", "bench.step_time", "--model", "resnet50-cifar", *LEVELS, *SLOW_MODEL, "--seconds", "{seconds}"],
    ),
)
SUMMARIES: dict[str, Callable[[Sequence[Row]], str]] = {
    "step_time": step_time.summary,
    "step_split": split.summary,
    "layers": layers.summary,
    "topk": topk.summary,
}


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    options.add_argument("--seconds", type=positive, default=480, metavar="S", help="for all measuring (default 480)")
    args = options.parse_args(argv)
    start = machine()
    status = 0
    begin = time.perf_counter()
    for stage in STAGES:
        print(f"== {stage.name}", flush=True)
        status |= run(stage, args.seconds)
        print(f"== {stage.name}: {time.perf_counter() - begin:.0f} s since the start", flush=True)
    print(f"\n{start['cpu']}, torch {start['torch']}, {start['date']}\n")
    print(summaries(RESULTS, start["date"]))
    draw(RESULTS, start["date"])
    return status


def run(stage: Stage, seconds: float) -> int:
    """Run a stage in a process of its own; 1 if it failed.

    The plan begins without the times that it knows of this machine, and leaves none: the record tells all.
    """
    command = [part.format(seconds=round(stage.share * seconds)) for part in stage.command]
    environment = {**os.environ, "GRANET_PLAN_CACHE": ""}
    root = Path(__file__).parents[1]
    return int(subprocess.run([sys.executable, *command], cwd=root, env=environment, check=False).returncode != 0)


def summaries(folder: Path, since: str) -> str:
    """The tables of all records since a date."""
    rows = {name: _rows(folder, name, since) for name in SUMMARIES}
    return "\n\n".join(SUMMARIES[name](found) for name, found in rows.items() if found)


def draw(folder: Path, since: str) -> None:
    """The pictures again, each of all the stages that belong to it."""
    layers.save_picture(_rows(folder, "layers", since), folder / "layers.png")
    step_time.save_picture(_rows(folder, "step_time", since), folder / "step_time.png")


def _rows(folder: Path, name: str, since: str) -> list[Row]:
    path = folder / f"{name}.csv"
    return load(path, since) if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
