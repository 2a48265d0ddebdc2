"""Time single layers: forward, dgrad, wgrad and all together, beside dense torch and its peers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bench import plots
from bench.layer_sets import LayerShape, layer_set
from bench.memory import peak_bytes
from bench.options import Record, granularity, parser, positive, sparsity
from bench.options import layers as layer_source
from bench.peers import DENSE, DIRECTIONS, IMPLEMENTATIONS, Candidate, Operands, Reference, candidate, draw, masked
from bench.records import MACHINE, RESULTS, TIMES, Row, geometric_mean, level_of, markdown, percent, unique
from bench.timing import Budget, Timing, alternate
from bench.verify import WrongResultError
from granet.distribution import kept_units
from granet.granularity import parse

COLUMNS = (
    *("set", "layer", "count", "in_mean", "direction", "batch", "dtype", "threads", "sparsity", "granularity"),
    *("implementation", *TIMES, "speedup_over_dense", "gflops", "bytes", *MACHINE),
)
# The measured plan tries its candidates in its first calls.
PLAN_WARMUP = 8

Key = tuple[str, float]  # implementation, sparsity


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(__doc__, "layers")
    options.add_argument(
        "--layers",
        nargs="+",
        type=layer_source,
        default=["vgg19"],
        metavar="SET",
        help='"linear", or models: their distinct convolutions at 32x32 (default vgg19)',
    )
    options.add_argument("--only", type=positive, metavar="N", help="only the first N layers of each set")
    options.add_argument("--batch", type=positive, default=128, metavar="N", help="images; the set linear has its own")
    options.add_argument("--sparsity", nargs="+", type=sparsity, default=[0.9, 0.95, 0.98], metavar="S")
    options.add_argument("--granularity", type=granularity, default="unstructured", help="as granet.sparsify takes it")
    options.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    options.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    sets = {name: layer_set(name, args.batch)[: args.only] for name in args.layers}

    record = Record(args.csv or RESULTS / "layers.csv", COLUMNS)
    budget = Budget(args.seconds, sum(map(len, sets.values())) * len(args.directions))
    for name, shapes in sets.items():
        for shape in shapes:
            layer = Layer(shape, args.granularity, args.sparsity, args.implementations)
            for direction in args.directions:
                rows = layer.measure(direction, record, args.rounds, budget)
                record.add([{"set": name, **row} for row in rows])
                print(_progress(rows), flush=True)
    save_picture(record.rows, record.path.with_suffix(".png"))
    return record.finish(summary)


def save_picture(rows: Sequence[Row], path: Path) -> None:
    """The picture of forward + backward."""
    plots.save_speedups(mean_speedups(rows), path, "Forward + backward of layers, geometric mean")


class Layer:
    """One layer with its operands, dense and at every sparsity, and the float64 reference."""

    def __init__(
        self, shape: LayerShape, granularity: str, sparsities: Sequence[float], implementations: Sequence[str]
    ) -> None:
        self.shape = shape
        self.granularity = granularity
        dense = draw(shape)
        self._reference = Reference(shape, dense)
        self._operands: dict[Key, Operands] = {(name, 0.0): dense for name in implementations if name in DENSE}
        for level in sparsities:
            sparse = masked(dense, draw_mask(shape, granularity, level))
            self._operands |= {(name, level): sparse for name in implementations if name not in DENSE}

    def measure(self, direction: str, record: Record, rounds: int, budget: Budget) -> list[Row]:
        """Rows of every implementation that computes this direction rightly."""
        seconds = budget.share()
        candidates = self._checked(direction, record)
        warmup = {key: PLAN_WARMUP for key in candidates if key[0] == "granet"}
        times = alternate({key: each.run for key, each in candidates.items()}, rounds, seconds, warmup)
        dense = min((times[key].median for key in times if key[0] in DENSE), default=None)
        return [self._row(direction, key, times[key], dense, candidates[key]) for key in times]

    def _checked(self, direction: str, record: Record) -> dict[Key, Candidate]:
        candidates = {}
        for key, operands in self._operands.items():
            made = candidate(key[0], direction, self.shape, operands)
            if made is None:
                continue
            try:
                self._reference.check(direction, made.results(made.run()), operands)
            except WrongResultError as error:
                record.refuse(f"{self.shape} {key[0]} at {percent(key[1])}", error)
            else:
                candidates[key] = made
        return candidates

    def _row(self, direction: str, key: Key, timing: Timing, dense: float | None, candidate: Candidate) -> Row:
        implementation, level = key
        mask = self._operands[key].mask
        density = 1.0 if mask is None else float(mask.float().mean())
        flops = 2 * self.shape.macs * density * (3 if direction == "all" else 1)
        return {
            "layer": str(self.shape),
            "count": self.shape.count,
            "in_mean": int(self.shape.in_mean),
            "direction": direction,
            "batch": self.shape.batch,
            "dtype": "float32",
            "sparsity": level,
            "granularity": "dense" if mask is None else self.granularity,
            "implementation": implementation,
            **timing.columns(),
            "speedup_over_dense": None if dense is None else dense / timing.median,
            "gflops": flops / timing.median / 1e9,
            "bytes": peak_bytes(candidate.run),
        }


def draw_mask(shape: LayerShape, granularity: str, level: float, seed: int = 1) -> Tensor:
    """A random mask of the weight's shape with exactly the kept units of this sparsity."""
    parsed = parse(granularity)
    units = parsed.units(shape.weight_shape)
    kept = torch.zeros(units, dtype=torch.bool)
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    kept[order[: kept_units(units, level)]] = True
    return parsed.expand(kept, shape.weight_shape)


def mean_speedups(rows: Sequence[Row], direction: str = "all", weighted: bool = False) -> plots.Curves:
    """Set to implementation to sparsity to the geometric mean of the speed-ups over the layers of the set.

    Where an implementation cannot do every layer of a set, it has no mean: it would stand beside means of all.

    Args:
        direction: one of DIRECTIONS; "all" is forward + backward.
        weighted: count a layer as often as the network has it.
    """
    curves: plots.Curves = {}
    counted = [r for r in rows if r["direction"] == direction and r["in_mean"] and r["speedup_over_dense"]]
    layers = {name: len(unique(r["layer"] for r in counted if r["set"] == name)) for name in unique(_sets(counted))}
    for name, implementation, level in unique((r["set"], r["implementation"], r["sparsity"]) for r in counted):
        same = [r for r in counted if (r["set"], r["implementation"], r["sparsity"]) == (name, implementation, level)]
        if implementation in DENSE or len(unique(r["layer"] for r in same)) < layers[name]:
            continue
        mean = geometric_mean([r["speedup_over_dense"] for r in same], [r["count"] if weighted else 1 for r in same])
        curves.setdefault(name, {}).setdefault(implementation, {})[level] = mean
    return curves


def summary(rows: Sequence[Row]) -> str:
    """Markdown: geometric means of each set against the best dense, and what granet reaches on every layer."""
    levels = sorted(unique(row["sparsity"] for row in rows if row["implementation"] not in DENSE))
    header = [percent(level) for level in levels]
    means = []
    for direction in unique(row["direction"] for row in rows):
        means += _mean_lines(mean_speedups(rows, direction), direction, levels)
    means += _mean_lines(mean_speedups(rows, weighted=True), "all, layers weighted by their number", levels)
    layers = [_layer_line(rows, name, layer, levels) for name, layer in unique((r["set"], r["layer"]) for r in rows)]
    return "\n\n".join(
        [
            markdown(["geometric mean over the best dense", *header], means),
            markdown(["granet, forward + backward", "dense ms", *header], [line for line in layers if line]),
        ]
    )


def _mean_lines(curves: plots.Curves, direction: str, levels: Sequence[float]) -> list[list[str]]:
    """Every implementation for forward + backward, granet alone for what is part of it."""
    return [
        [f"{name}, {direction}, {implementation}", *(_times(by_level.get(level)) for level in levels)]
        for name, lines in curves.items()
        for implementation, by_level in lines.items()
        if direction == "all" or implementation == "granet"
    ]


def _layer_line(rows: Sequence[Row], name: str, layer: str, levels: Sequence[float]) -> list[str]:
    """The best dense time of a layer and granet's speed-ups; nothing if they were not measured."""
    same = [r for r in rows if (r["set"], r["layer"], r["direction"]) == (name, layer, "all")]
    dense = min((r["ms_median"] for r in same if r["implementation"] in DENSE), default=None)
    found = {r["sparsity"]: r["speedup_over_dense"] for r in same if r["implementation"] == "granet"}
    if dense is None or not found:
        return []
    return [layer, f"{dense:.2f}", *(_times(found.get(level)) for level in levels)]


def _sets(rows: Sequence[Row]) -> list[str]:
    return [row["set"] for row in rows]


def _times(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}x"


def _progress(rows: Sequence[Row]) -> str:
    if not rows:
        return "nothing measured"
    times = ", ".join(f"{row['implementation']}{level_of(row)} {row['ms_median']:.2f}" for row in rows)
    return f"{rows[0]['layer']}, {rows[0]['direction']} (ms): {times}"


if __name__ == "__main__":
    sys.exit(main())
