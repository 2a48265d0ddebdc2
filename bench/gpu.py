"""What the benchmarks of a GPU share: the device, its bandwidth, and times of functions that take turns on it."""

from __future__ import annotations

import argparse
import itertools
import subprocess
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from bench import timing
from bench.records import RESULTS, Row, machine
from bench.roofline import SHEETS, SIZES, Chip
from bench.timing import Timing

Key = TypeVar("Key", bound=Hashable)

MACHINE = ("date", "gpu", "driver", "torch", "triton")
_COPIED = 2**28  # float32s of the copy that measures the bandwidth: far more than a cache holds
_FLUSHED = 2**28  # bytes that are written between two measurements, so that neither finds its operands in the cache


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options of every benchmark of a GPU, `python -m bench.NAME`."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description, allow_abbrev=False)
    made.add_argument("--csv", type=Path, default=RESULTS / f"{name}.csv", metavar="FILE", help="append records here")
    made.add_argument("--seconds", type=float, default=60.0, metavar="S", help="for the whole command (default 60)")
    made.add_argument(
        "--dry",
        action="store_true",
        help="walk through everything with tiny sizes, on the CPU where there is no GPU: the times mean nothing",
    )
    return made


def device(dry: bool) -> torch.device:
    """The GPU; in a dry run without one the CPU, where Triton has to be told to interpret.

    Raises:
        ValueError: no GPU, and the run is to be measured.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not dry:
        raise ValueError("expected a CUDA device, got none: `--dry` walks through without one")
    return torch.device("cpu")


def described(on: torch.device) -> Row:
    """date (UTC), gpu, driver and versions: the same in all rows of a run."""
    import triton

    known = machine()
    gpu, driver = "none, a dry run", ""
    if on.type == "cuda":
        gpu, driver = torch.cuda.get_device_name(on), _query("driver_version")
    return {
        "date": known["date"],
        "gpu": gpu,
        "driver": driver,
        "torch": known["torch"],
        "triton": triton.__version__,
    }


def _query(name: str) -> str:
    """What nvidia-smi says of the first GPU, or "unknown"."""
    command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def alternate(
    candidates: Mapping[Key, Callable[[], object]], on: torch.device, rounds: int, seconds: float
) -> dict[Key, Timing]:
    """Call the candidates in turn, and time each call by events on the device, with nothing of it in the cache.

    Times begin when the device does, so a candidate that keeps it waiting for its launches is charged for that.
    """
    if on.type == "cpu":
        return timing.alternate(candidates, rounds, seconds, least_sample=0.0)
    for run in candidates.values():
        for _ in range(3):
            run()
    flush = torch.empty(_FLUSHED, dtype=torch.int8, device=on)
    samples: dict[Key, list[float]] = {key: [] for key in candidates}
    clock = torch.cuda.Event(enable_timing=True)
    clock.record()
    for number, order in enumerate(itertools.islice(timing.orders(list(candidates)), rounds)):
        pairs = {}
        for key in order:
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            candidates[key]()
            end.record()
            pairs[key] = begin, end
        torch.cuda.synchronize()
        for key, (begin, end) in pairs.items():
            samples[key].append(begin.elapsed_time(end) / 1000)
        if number + 1 >= timing.LEAST_ROUNDS and clock.elapsed_time(end) / 1000 > seconds:
            break
    return {key: Timing(tuple(values)) for key, values in samples.items()}


def captured(run: Callable[[], object], on: torch.device) -> Callable[[], object]:
    """`run` as one graph, so that its launches cost the host nothing; on a CPU `run` itself."""
    if on.type == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def chip(on: torch.device, dry: bool) -> Chip:
    """The device, as far as it can be measured in a moment: bandwidth, dense rates; of a CPU, some numbers."""
    if on.type == "cpu":
        return Chip("none, a dry run", 1, 1e9, 1e9, 1e9, dict.fromkeys(SIZES, 1e9))
    about = torch.cuda.get_device_properties(on)
    size = 4096
    rates: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        left, right = (torch.randn(size, size, device=on).to(dtype) for _ in range(2))
        times = alternate({"dense": partial(torch.mm, left, right)}, on, 10, 2)
        rates[name] = 2 * size**3 / times["dense"].median
    rates["tf32"] = max(rates["float32"], rates["bfloat16"] / 2)
    clock = _query("clocks.max.sm")
    hertz = 1e6 * float(clock.split()[0]) if clock.split()[0].isdecimal() else SHEETS[-1].clock
    second = SHEETS[-1].second_level * hertz / SHEETS[-1].clock
    return Chip(about.name, about.multi_processor_count, hertz, bandwidth(on, dry), second, rates)


def bandwidth(on: torch.device, dry: bool) -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    source = torch.ones(1000 if dry else _COPIED, device=on)
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source)}, on, 3 if dry else 20, 5)
    return 2 * source.numel() * source.element_size() / times["copy"].median
