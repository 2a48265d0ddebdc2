"""Time whole training steps: forward, loss, backward, SGD step, zero_grad; dense and sparse models take turns."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import plots, split
from bench.memory import peak_bytes
from bench.options import Record, granularity, model, parser, positive, sparsity
from bench.records import MACHINE, RESULTS, TIMES, Row, level_of, markdown, percent, unique
from bench.step_models import (
    DENSE,
    IMPLEMENTATIONS,
    WITHOUT_MASKS,
    Setting,
    Trainer,
    check_gradients,
    check_image_size,
    reference_gradients,
)
from bench.timing import Budget, Timing, alternate
from bench.verify import WrongResultError
from granet.distribution import DISTRIBUTIONS

COLUMNS = (
    *("model", "batch", "dtype", "threads", "sparsity", "granularity", "distribution", "implementation", *TIMES),
    *("speedup_over_dense", "gflops", "bytes", *MACHINE),
)
DEFAULT = (*WITHOUT_MASKS, "dense-times-mask", "granet", "granet-native")
# The measured plan begins with a guess and goes on to try its candidates while it works: see granet_kernels.plan.
PLAN_WARMUP = 10

Key = tuple[str, str, float]  # implementation, granularity, sparsity


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__, "step_time")
    options.add_argument(
        "--model", nargs="+", type=model, default=["vgg19"], metavar="MODEL", help="models of granet (default vgg19)"
    )
    options.add_argument("--batch", type=positive, default=128, metavar="N")
    options.add_argument("--image-size", type=positive, default=32, metavar="N")
    options.add_argument("--sparsity", nargs="+", type=sparsity, default=[0.9, 0.95, 0.98], metavar="S")
    options.add_argument(
        "--granularity", nargs="+", type=granularity, default=["unstructured"], help="as granet.sparsify takes it"
    )
    options.add_argument(
        "--distribution", choices=DISTRIBUTIONS, default="erk", help="of the kept weights over the layers (default erk)"
    )
    options.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=DEFAULT)
    options.add_argument("--fused", action="store_true", help="the fused optimizer, for all implementations")
    options.add_argument(
        "--split", action="store_true", help="show where the time of a step goes instead, by torch.profiler"
    )
    args = options.parse_args(argv)
    settings = [Setting(name, args.batch, args.image_size, args.distribution, args.fused) for name in args.model]
    try:
        for setting in settings:
            check_image_size(setting)
    except ValueError as error:
        options.error(str(error))
    torch.set_num_threads(args.threads or torch.get_num_threads())
    levels = [(name, level) for name in args.granularity for level in args.sparsity]
    if args.split:
        return split.show(settings, levels, args.csv or RESULTS / "step_split.csv", args.rounds, PLAN_WARMUP)

    record = Record(args.csv or RESULTS / "step_time.csv", COLUMNS)
    budget = Budget(args.seconds, len(settings))
    for setting in settings:
        seconds = budget.share() + time.perf_counter()
        trainers = _trainers(setting, args.implementations, levels, record)
        rows = measure(trainers, record, args.rounds, seconds - time.perf_counter())
        record.add(rows)
        print(_progress(setting, rows), flush=True)
        del trainers
    save_picture(record.rows, record.path.with_suffix(".png"))
    return record.finish(summary)


def save_picture(rows: Sequence[Row], path: Path) -> None:
    """The picture of whole steps."""
    batches = ", ".join(map(str, unique(row["batch"] for row in rows)))
    plots.save_speedups(speedups(rows), path, f"Training step, batch {batches}")


def measure(trainers: dict[Key, Trainer], record: Record, rounds: int, seconds: float) -> list[Row]:
    """Rows of the models that take turns; one whose loss is not finite in the end gets none."""
    warmup = {key: PLAN_WARMUP for key, trainer in trainers.items() if trainer.uses_measured_plan}
    times = alternate({key: trainer.step for key, trainer in trainers.items()}, rounds, seconds, warmup)
    right = {}
    for key, trainer in trainers.items():
        try:
            trainer.check_loss()
        except WrongResultError as error:
            record.refuse(_name(trainer.setting, key), error)
        else:
            right[key] = times[key]
    dense = min((timing.median for key, timing in right.items() if key[0] in DENSE), default=None)
    return [_row(trainers[key], key, timing, dense) for key, timing in right.items()]


def _trainers(
    setting: Setting, implementations: Sequence[str], levels: Sequence[tuple[str, float]], record: Record
) -> dict[Key, Trainer]:
    """The models to time: all that compute the gradients of dense torch."""
    found: dict[Key, Trainer] = {}
    for units, level in [("dense", 0.0), *levels]:
        wanted = [name for name in implementations if (name in WITHOUT_MASKS) == (units == "dense")]
        if not wanted:
            continue
        reference = reference_gradients(setting, units, level)
        for implementation in wanted:
            key = (implementation, units, level)
            trainer = Trainer(setting, *key)
            try:
                check_gradients(trainer, reference)
            except WrongResultError as error:
                record.refuse(_name(setting, key), error)
            else:
                found[key] = trainer
    return found


def _row(trainer: Trainer, key: Key, timing: Timing, dense: float | None) -> Row:
    implementation, units, level = key
    return {
        "model": trainer.setting.model,
        "batch": trainer.setting.batch,
        "dtype": "float32",
        "sparsity": level,
        "granularity": units,
        "distribution": trainer.setting.distribution,
        "implementation": implementation,
        **timing.columns(),
        "speedup_over_dense": None if dense is None else dense / timing.median,
        "gflops": trainer.useful_flops() / timing.median / 1e9,
        "bytes": peak_bytes(trainer.step),
    }


def speedups(rows: Sequence[Row]) -> plots.Curves:
    """Model and granularity to implementation to sparsity to speed-up."""
    curves: plots.Curves = {}
    for row in rows:
        if row["granularity"] != "dense" and row["speedup_over_dense"]:
            lines = curves.setdefault(f"{row['model']}, {row['granularity']}", {})
            lines.setdefault(row["implementation"], {})[row["sparsity"]] = row["speedup_over_dense"]
    return curves


def summary(rows: Sequence[Row]) -> str:
    """Markdown: one line a model, granularity, sparsity and implementation."""
    header = ["training step", "sparsity", "ms", "20 to 80 %", "over the best dense", "GFLOP/s", "peak MB"]
    lines = [
        [
            f"{row['model']}, {row['implementation']}" + _unless_dense(row),
            level_of(row).strip(),
            _ms(row["ms_median"]),
            f"{_ms(row['ms_p20'])} to {_ms(row['ms_p80'])}",
            "n/a" if row["speedup_over_dense"] is None else f"{row['speedup_over_dense']:.2f}x",
            f"{row['gflops']:.0f}",
            "n/a" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f}",
        ]
        for row in rows
    ]
    return markdown(header, lines)


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _unless_dense(row: Row) -> str:
    return "" if row["granularity"] in ("dense", "unstructured") else f", {row['granularity']}"


def _name(setting: Setting, key: Key) -> str:
    return f"{setting.model} {key[0]}" + ("" if key[1] == "dense" else f" {key[1]} at {percent(key[2])}")


def _progress(setting: Setting, rows: Sequence[Row]) -> str:
    times = (f"{row['implementation']}{level_of(row)} {row['ms_median']:.0f}" for row in rows)
    return f"{setting.model}, batch {setting.batch} (ms): {', '.join(times)}"


if __name__ == "__main__":
    sys.exit(main())
