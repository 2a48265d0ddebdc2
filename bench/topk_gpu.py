"""Time the exact selection on a GPU, beside torch.topk and torch.kthvalue, and beside what the memory allows.

The least that an exact mask needs is one pass that reads all scores before the threshold is known and one that reads
them again to write the mask: 2 * 4 + 1 bytes a unit. `floor` is that over the bandwidth of a copy in the same run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from bench import gpu
from bench.records import TIMES, Row, append, markdown
from bench.timing import Budget, Timing
from bench.verify import WrongResultError
from granet_kernels.triton_backend.topk import topk_mask_triton

COLUMNS = (
    *("units", "segments", "kept", "implementation", *TIMES, "bytes", "floor_ms", "of_floor", "over_topk"),
    *gpu.MACHINE,
)
BYTES = 2 * 4 + 1
UNITS = (1_000_000, 100_000_000, 1_000_000_000)
DRY_UNITS = (1000,)
SEGMENTS = 54  # as many as ResNet-50 has layers
DENSITY = 0.1
_MOST_SORTED = 200_000_000  # units; torch's own selections need too much memory, or minutes, for more


def main(argv: Sequence[str] | None = None) -> int:
    options = gpu.parser(__doc__, "topk_gpu")
    args = options.parse_args(argv)
    try:
        on = gpu.device(args.dry)
    except ValueError as error:
        options.error(str(error))
    about = gpu.described(on)
    copied = gpu.bandwidth(on, args.dry)
    print(f"{about['gpu']}, driver {about['driver']}: a copy moves {copied / 1e12:.3f} TB/s")
    sizes = DRY_UNITS if args.dry else UNITS
    budget = Budget(args.seconds, len(sizes))
    rows: list[Row] = []
    for units in sizes:
        segments, rounds = (3, 2) if args.dry else (SEGMENTS, 50)
        found = measure(units, segments, on, rounds, budget.share(), copied)
        append(args.csv, COLUMNS, [{**row, **about} for row in found])
        rows += found
    print(summary(rows))
    return 0


def measure(units: int, segments: int, on: torch.device, rounds: int, seconds: float, copied: float) -> list[Row]:
    """Rows of every selection of so many units, granet's checked first."""
    scores = torch.randn(units, generator=torch.Generator(on).manual_seed(0), device=on)
    kept = max(1, round(DENSITY * units))
    bounds = [units * number // segments for number in range(segments + 1)]
    counts = [round(DENSITY * (end - begin)) for begin, end in pairwise(bounds)]
    run_global = _selection(scores, [kept], [0, units])
    run_segments = _selection(scores, counts, bounds)
    check(run_global(), scores, [kept], [0, units])
    check(run_segments(), scores, counts, bounds)
    candidates: dict[str, Callable[[], object]] = {
        "granet": run_global,
        "granet, one graph": gpu.captured(run_global, on),
        "granet, segments": run_segments,
        "granet, segments, one graph": gpu.captured(run_segments, on),
    }
    if units <= _MOST_SORTED:
        candidates["torch.topk"] = partial(torch.topk, scores, kept, sorted=False)
        candidates["torch.kthvalue"] = partial(torch.kthvalue, scores, units - kept + 1)
    else:
        candidates["torch.topk"] = partial(torch.topk, scores, kept, sorted=False)
    times = gpu.alternate(candidates, on, rounds, seconds)
    floor = BYTES * units / copied
    topk = times["torch.topk"]
    return [
        _row(name, timing, units, segments if "segments" in name else 1, kept, floor, topk)
        for name, timing in times.items()
    ]


def _selection(scores: Tensor, counts: list[int], bounds: list[int]) -> Callable[[], Tensor]:
    amounts, offsets = torch.tensor(counts, device=scores.device), torch.tensor(bounds)
    return lambda: topk_mask_triton([scores], amounts, offsets, None, True)


def check(mask: Tensor, scores: Tensor, counts: list[int], bounds: list[int]) -> None:
    """Raise WrongResultError unless each segment has its count, and none that is left out is above one that is in.

    Of equal scores at the threshold the first ones must be in.
    """
    for count, begin, end in zip(counts, bounds, bounds[1:], strict=False):
        selected, magnitude = mask[begin:end], scores[begin:end].abs()
        if int(selected.count_nonzero()) != count:
            raise WrongResultError(f"expected {count} units, got {int(selected.count_nonzero())}")
        if not 0 < count < end - begin:
            continue
        least = magnitude[selected].min()
        tied = selected[magnitude == least].to(torch.int8)
        if bool((magnitude[~selected] > least).any()) or bool((tied.diff() > 0).any()):
            raise WrongResultError("expected the highest scores, of equal ones the first, got others")


def _row(name: str, timing: Timing, units: int, segments: int, kept: int, floor: float, topk: Timing) -> Row:
    return {
        "units": units,
        "segments": segments,
        "kept": kept,
        "implementation": name,
        **timing.columns(),
        "bytes": BYTES * units,
        "floor_ms": 1000 * floor,
        "of_floor": timing.median / floor,
        "over_topk": topk.median / timing.median,
    }


def summary(rows: Sequence[Row]) -> str:
    """Markdown: one line a number of units and selection."""
    header = ["keep a tenth", "units", "ms", "20 to 80 %", "times the floor", "over torch.topk"]
    lines = [
        [
            row["implementation"],
            f"{row['units']:,}",
            f"{row['ms_median']:.3f}",
            f"{row['ms_p20']:.3f} to {row['ms_p80']:.3f}",
            f"{row['of_floor']:.2f}x",
            f"{row['over_topk']:.2f}x",
        ]
        for row in rows
    ]
    return markdown(header, lines)


if __name__ == "__main__":
    sys.exit(main())
