"""Where the time of a training step goes: the self times of torch.profiler, added up by what they belong to.

A profiler sees ops, so each gradient is an op of its own here; in a step that nothing watches, both are one call.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from bench import plots
from bench.options import Record
from bench.records import MACHINE, Row, level_of, markdown, unique
from bench.step_models import DENSE, Setting, Trainer

COLUMNS = (
    *("model", "batch", "dtype", "threads", "sparsity", "granularity", "implementation", "part", "ms", *MACHINE),
)
FORWARD, DGRAD, WGRAD, OTHER = "conv forward", "conv dgrad", "conv wgrad", "other"
BOTH = "conv dgrad + wgrad"  # of layers that granet leaves to torch, which computes them in one call
NORM = "batch norm, ReLU"  # granet computes them together
PARTS = (FORWARD, DGRAD, WGRAD, BOTH, NORM, "pooling", "optimizer", OTHER)

# The first with which the name of an operation, or of one around it, begins.
_RULES = (
    ("Optimizer.", "optimizer"),
    (f"bench::{DGRAD}", DGRAD),
    (f"bench::{WGRAD}", WGRAD),
    ("granet::conv2d_dgrad", DGRAD),
    ("granet::conv2d_wgrad", WGRAD),
    ("granet::conv2d", FORWARD),
    ("aten::conv2d", FORWARD),
    ("aten::convolution_backward", BOTH),
    ("granet::norm", NORM),
    ("aten::batch_norm", NORM),
    ("aten::native_batch_norm", NORM),
    ("aten::relu", NORM),
    ("aten::threshold_backward", NORM),
    ("granet::max_pool", "pooling"),
    ("aten::max_pool2d", "pooling"),
    ("aten::adaptive_avg_pool2d", "pooling"),
    ("MaxPool2D", "pooling"),
    ("MeanBackward", "pooling"),
)


class _SplitConvBackward(TorchDispatchMode):
    """Runs torch's gradient of a convolution as two calls, one for the input and one for the weight, each named."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.convolution_backward.default:
            return func(*args, **(kwargs or {}))
        *operands, (needs_x, needs_weight, needs_bias) = args
        x_grad = w_grad = bias_grad = None
        if needs_x:
            with record_function(f"bench::{DGRAD}"):
                x_grad = func(*operands, [True, False, False])[0]
        with record_function(f"bench::{WGRAD}"):
            _, w_grad, bias_grad = func(*operands, [False, needs_weight, needs_bias])
        return x_grad, w_grad, bias_grad


def split_step(trainer: Trainer, steps: int) -> dict[str, float]:
    """Milliseconds of each part of a step, the mean of some steps. "other" is all the rest, Python's time too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning: Profiler clears events", UserWarning)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            begin = time.perf_counter()
            for _ in range(steps):
                _step(trainer)
            seconds = time.perf_counter() - begin
    parts = dict.fromkeys(PARTS, 0.0)
    for event in profiler.events():
        parts[_part_of(event)] += event.self_cpu_time_total / 1000 / steps
    parts[OTHER] = max(0.0, 1000 * seconds / steps - sum(ms for part, ms in parts.items() if part != OTHER))
    return parts


def _step(trainer: Trainer) -> None:
    if trainer.implementation in DENSE:
        with _SplitConvBackward():
            trainer.step()
    else:
        trainer.step()


def _part_of(event: Any) -> str:
    path = [event.name]
    while event.cpu_parent is not None:
        event = event.cpu_parent
        path.append(event.name)
    for start, part in _RULES:
        if any(name.startswith(start) for name in path):
            return part
    return OTHER


def show(settings: Sequence[Setting], levels: Sequence[tuple[str, float]], path: Path, steps: int, warmup: int) -> int:
    """Record and draw the split of each model, dense in both layouts and granet at each level; the exit status."""
    record = Record(path, COLUMNS)
    for setting in settings:
        splits: dict[str, dict[str, float]] = {}
        for key in [*((name, "dense", 0.0) for name in DENSE), *(("granet", *level) for level in levels)]:
            trainer = Trainer(setting, *key)
            for _ in range(warmup):
                trainer.step()
            rows = _rows(setting, key, split_step(trainer, steps))
            splits[f"{key[0]}{level_of(rows[0])}"] = {row["part"]: row["ms"] for row in rows}
            record.add(rows)
        title = f"{setting.model}, batch {setting.batch}: a training step under the profiler"
        plots.save_split(splits, path.with_name(f"{path.stem}-{setting.model.replace('/', '-')}.png"), title)
    return record.finish(summary)


def _rows(setting: Setting, key: tuple[str, str, float], parts: dict[str, float]) -> list[Row]:
    implementation, granularity, sparsity = key
    fixed = {
        "model": setting.model,
        "batch": setting.batch,
        "dtype": "float32",
        "sparsity": sparsity,
        "granularity": granularity,
        "implementation": implementation,
    }
    return [{**fixed, "part": part, "ms": ms} for part, ms in parts.items()]


def summary(rows: Sequence[Row]) -> str:
    """Markdown: one line a model and implementation, milliseconds by part."""
    lines = []
    for key in unique((row["model"], row["granularity"], row["implementation"], row["sparsity"]) for row in rows):
        same = [r for r in rows if (r["model"], r["granularity"], r["implementation"], r["sparsity"]) == key]
        times = [row["ms"] for row in same]
        name = f"{key[0]}, {key[2]}{level_of(same[0])}"
        lines.append([name, *(f"{ms:.0f}" for ms in times), f"{sum(times):.0f}"])
    return markdown(["ms of a step", *PARTS, "sum"], lines)
