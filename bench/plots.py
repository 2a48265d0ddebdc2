"""Pictures of measurements: speed-up over sparsity with the break-even, the parts of a step, the speed of runs."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from bench.records import Row
from granet.files import write_atomically

# Panel to line to sparsity to speed-up.
Curves = dict[str, dict[str, dict[float, float]]]

_COLOURS = {
    "granet": "#2f6fb3",
    "granet-channels_last": "#173f6b",
    "granet-native": "#3a9a6b",
    "granet-native-channels_last": "#86c7a5",
    "csr": "#e07b39",
    "dense-times-mask": "#8a8f98",
}
_GREY = "#8a8f98"
_RUNS = ("#2f6fb3", "#e07b39", "#3a9a6b", "#8e6bb0")
_PARTS = ("#2f6fb3", "#6fa3d8", "#b5d0ec", "#e07b39", "#f0b48a", "#3a9a6b", "#8e6bb0", "#c9ccd1")


def break_even(by_sparsity: Mapping[float, float]) -> float | None:
    """The sparsity from which on the speed-up is 1 or more, between the two points around it; else None.

    The logarithm of the speed-up is taken as linear between two points.
    """
    points = sorted((level, math.log(value)) for level, value in by_sparsity.items())
    for (low, under), (high, over) in reversed(list(itertools.pairwise(points))):
        if over < 0:
            return None  # slower than dense at the highest sparsity
        if under < 0:
            return low + (high - low) * -under / (over - under)
    return None


def save_speedups(curves: Curves, path: Path, title: str) -> None:
    """One panel a set or model: speed-up over the best dense against sparsity, log scale; nothing without curves."""
    if not curves:
        return
    figure = _figure(4.4 * len(curves), 3.9)
    panes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (panel, lines) in zip(panes, curves.items(), strict=True):
        for name, by_sparsity in lines.items():
            _speedup(axes, name, by_sparsity)
        axes.axhline(1, color="#444a52", linewidth=1)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("sparsity")
        axes.set_title(panel, loc="left", fontsize=11)
        _plain(axes)
        axes.legend(frameon=False, fontsize=8)
    panes[0].set_ylabel("speed-up over the best dense")
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _speedup(axes: Axes, name: str, by_sparsity: Mapping[float, float]) -> None:
    levels = sorted(by_sparsity)
    colour = _COLOURS.get(name, _GREY)
    axes.plot(levels, [by_sparsity[level] for level in levels], color=colour, label=name, marker="o", markersize=3.5)
    place = break_even(by_sparsity)
    if place is None:
        return
    axes.plot([place], [1], marker="D", color=colour, markersize=6, zorder=3)
    if name.startswith("granet"):
        axes.annotate(f"{place:.0%}", (place, 1), (4, -13), textcoords="offset points", color=colour, fontsize=8)


def save_split(splits: Mapping[str, Mapping[str, float]], path: Path, title: str) -> None:
    """Stacked bars: milliseconds of each part of a step, one bar an implementation."""
    figure = _figure(8.5, 1.6 + 0.55 * len(splits))
    axes = figure.subplots()
    left = [0.0] * len(splits)
    for index, part in enumerate(next(iter(splits.values()))):
        widths = [split[part] for split in splits.values()]
        if not any(widths):
            continue
        axes.barh(list(splits), widths, left=left, color=_PARTS[index % len(_PARTS)], label=part, height=0.65)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.0f} ms", va="center", fontsize=8)
    axes.set_xlim(0, max(left) * 1.12)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title, loc="left", fontsize=11)
    _plain(axes)
    axes.legend(frameon=False, fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def save_bars(panels: Mapping[str, Mapping[str, float]], path: Path, title: str) -> None:
    """Bars of milliseconds, ours in colour, one panel a task; nothing without panels."""
    if not panels:
        return
    figure = _figure(4.8 * len(panels), 0.9 + 0.4 * max(map(len, panels.values())))
    panes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (panel, times) in zip(panes, panels.items(), strict=True):
        colours = [_COLOURS["granet"] if name.startswith("granet") else _GREY for name in times]
        axes.barh(list(times), list(times.values()), color=colours, height=0.65)
        for place, milliseconds in enumerate(times.values()):
            axes.text(milliseconds, place, f" {milliseconds:.3g} ms", va="center", fontsize=8)
        axes.set_xlim(0, max(times.values()) * 1.2)
        axes.invert_yaxis()
        axes.set_xlabel("ms")
        axes.set_title(panel, loc="left", fontsize=11)
        _plain(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _save(figure, path)


def save_training(epochs: Mapping[str, Sequence[Row]], path: Path, title: str) -> None:
    """Images a second over the epochs of some runs; beside it sparsity, and the share of products computed natively."""
    figure = _figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    for (name, rows), colour in zip(epochs.items(), _RUNS * len(epochs), strict=False):
        numbers = [row["epoch"] for row in rows]
        style = {"color": colour, "linewidth": 1.8, "marker": "o", "markersize": 3.5}
        left.plot(numbers, [row["images_per_second"] for row in rows], label=name, **style)
        shares = [(row["epoch"], row["native_share"]) for row in rows if row["native_share"] is not None]
        if shares:
            right.plot(*zip(*shares, strict=True), label=f"native, {name}", **style)
    rows = next(iter(epochs.values()))
    right.plot([row["epoch"] for row in rows], [row["sparsity"] for row in rows], color=_GREY, label="sparsity")
    left.set_ylim(bottom=0)
    left.set_ylabel("training images/s")
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8)
        _plain(axes)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(image.getvalue()))
