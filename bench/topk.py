"""Time the selection of the highest scores, beside numpy and torch: all at once, by segment, and by magnitude."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import granet_kernels
from bench import plots
from bench.options import Record, parser, positive
from bench.records import MACHINE, RESULTS, TIMES, Row, markdown, unique
from bench.timing import Budget, Timing, alternate
from bench.verify import WrongResultError
from granet_kernels.reference import topk_mask_ref

COLUMNS = (
    *("units", "segments", "kept", "dtype", "threads", "implementation", *TIMES, "speedup_over_numpy", "gbytes_per_s"),
    *MACHINE,
)
DENSITY = 0.1


@dataclass(frozen=True)
class Selection:
    """One way to select.

    Attributes:
        run: what is timed; peers need not return a mask, only what they have after the selection.
        check: raises WrongResultError unless what `run` returned is right.
        segments: how many are selected from, each on its own.
        peer: which of the others is numpy's time for the same task.
    """

    run: Callable[[], Any]
    check: Callable[[Any], None]
    peer: str = "np.partition"
    segments: int = 1


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__, "topk")
    options.add_argument("--units", nargs="+", type=positive, default=[1_000_000, 25_500_000], metavar="N")
    options.add_argument(
        "--segments", type=positive, default=16, metavar="N", help="for the selection by segment (default 16)"
    )
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    record = Record(args.csv or RESULTS / "topk.csv", COLUMNS)
    budget = Budget(args.seconds, len(args.units))
    for units in args.units:
        rows = measure(units, args.segments, record, args.rounds, budget.share())
        record.add(rows)
        print(f"{units:,} (ms): " + ", ".join(f"{r['implementation']} {r['ms_median']:.2f}" for r in rows), flush=True)
    save_picture(record.rows, record.path.with_suffix(".png"))
    return record.finish(summary)


def measure(units: int, segments: int, record: Record, rounds: int, seconds: float) -> list[Row]:
    """Rows of every selection from so many units that is right."""
    candidates = {}
    for name, each in selections(units, segments).items():
        try:
            each.check(each.run())
        except WrongResultError as error:
            record.refuse(f"{name} of {units:,} units", error)
        else:
            candidates[name] = each
    times = alternate({name: each.run for name, each in candidates.items()}, rounds, seconds)
    return [_row(name, candidates[name], units, times) for name in times]


def selections(units: int, segments: int) -> dict[str, Selection]:
    """All selections of a tenth of normal weights, or of their magnitudes, with their checks."""
    weights = torch.randn(units, generator=torch.Generator().manual_seed(0))
    scores = weights.abs()
    values, raw = scores.numpy(), weights.numpy()
    kept = max(1, round(DENSITY * units))
    bounds = [units * index // segments for index in range(segments + 1)]
    counts = [max(1, round(DENSITY * (end - begin))) if end > begin else 0 for begin, end in itertools.pairwise(bounds)]
    expected = _reference(scores, [kept], [0, units])
    by_segment = _reference(scores, counts, bounds)
    threshold = float(scores[expected].min())

    def is_threshold(found: float) -> None:
        if found != threshold:
            raise WrongResultError(f"expected the threshold {threshold!r}, got {found!r}")

    return {
        "np.partition": Selection(
            lambda: np.partition(values, units - kept), lambda r: is_threshold(float(r[units - kept]))
        ),
        "np.abs + np.partition": Selection(
            lambda: np.partition(np.abs(raw), units - kept), lambda r: is_threshold(float(r[units - kept]))
        ),
        "torch.topk": Selection(
            lambda: torch.topk(scores, kept, sorted=False).values, lambda r: is_threshold(float(r.min()))
        ),
        "torch.kthvalue": Selection(
            lambda: torch.kthvalue(scores, units - kept + 1).values, lambda r: is_threshold(float(r))
        ),
        "granet": Selection(lambda: granet_kernels.topk_mask(scores, kept), _is_mask(expected)),
        "granet, segments": Selection(
            lambda: granet_kernels.topk_mask(scores, counts, bounds), _is_mask(by_segment), segments=segments
        ),
        "granet, by magnitude": Selection(
            lambda: granet_kernels.topk_mask(weights, kept, absolute=True), _is_mask(expected), "np.abs + np.partition"
        ),
    }


def _reference(scores: Tensor, counts: list[int], bounds: list[int]) -> Tensor:
    return topk_mask_ref(scores, torch.tensor(counts), torch.tensor(bounds))


def _is_mask(expected: Tensor) -> Callable[[Tensor], None]:
    def check(mask: Tensor) -> None:
        if mask.dtype != torch.bool or mask.shape != expected.shape or not torch.equal(mask, expected):
            wrong = int((mask != expected).sum()) if mask.shape == expected.shape else expected.numel()
            raise WrongResultError(f"expected the mask of the reference, got another one in {wrong} places")

    return check


def _row(name: str, selection: Selection, units: int, times: dict[str, Timing]) -> Row:
    peer = times.get(selection.peer)
    return {
        "units": units,
        "segments": selection.segments,
        "kept": max(1, round(DENSITY * units)),
        "dtype": "float32",
        "implementation": name,
        **times[name].columns(),
        "speedup_over_numpy": None if peer is None else peer.median / times[name].median,
        "gbytes_per_s": 4 * units / times[name].median / 1e9,
    }


def save_picture(rows: Sequence[Row], path: Path) -> None:
    """Bars: milliseconds of each selection, one panel a number of units."""
    panels = {
        f"{units:,} scores": {row["implementation"]: row["ms_median"] for row in rows if row["units"] == units}
        for units in unique(row["units"] for row in rows)
    }
    plots.save_bars(panels, path, f"a tenth selected, {rows[0]['threads']} threads" if rows else "")


def summary(rows: Sequence[Row]) -> str:
    """Markdown: one line a number of units and selection."""
    header = ["keep a tenth", "units", "ms", "20 to 80 %", "over np.partition", "GB/s of scores"]
    lines = [
        [
            row["implementation"],
            f"{row['units']:,}",
            f"{row['ms_median']:.2f}",
            f"{row['ms_p20']:.2f} to {row['ms_p80']:.2f}",
            "n/a" if row["speedup_over_numpy"] is None else f"{row['speedup_over_numpy']:.2f}x",
            f"{row['gbytes_per_s']:.2f}",
        ]
        for row in rows
    ]
    return markdown(header, lines)


if __name__ == "__main__":
    sys.exit(main())
