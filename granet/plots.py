"""The pictures of a run: learning curves, sparsity and FLOPs, speed; the final sparsity of each layer."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from granet.files import write_atomically
from granet.run import Row, RunFolder

_BLUE, _ORANGE, _GREEN, _GREY = "#2f6fb3", "#e07b39", "#3a9a6b", "#8a8f98"


def plot_run(folder: RunFolder) -> list[Path]:
    """Draw the pictures of a run from its metrics.jsonl and layers.csv; returns the PNG files."""
    rows = folder.load_metrics()
    figures = {
        "learning.png": learning_curves(rows),
        "sparsity.png": sparsity_and_flops(rows),
        "speed.png": speed(rows),
        "layers.png": layer_sparsity(folder.load_layers()),
    }
    return [_save(figure, folder.path / name) for name, figure in figures.items()]


def learning_curves(rows: list[Row]) -> Figure:
    """Loss and accuracy over the epochs, training and validation."""
    figure, (left, right) = _figure(2, 9.0, 3.6)
    epochs = [row["epoch"] for row in rows]
    for axes, quantity in ((left, "loss"), (right, "accuracy")):
        _line(axes, epochs, [row[f"train_{quantity}"] for row in rows], _BLUE, "training")
        values = [row[f"validation_{quantity}"] for row in rows]
        if None not in values:
            _line(axes, epochs, values, _ORANGE, "validation")
        axes.set_title(quantity.capitalize(), loc="left", fontsize=11)
        axes.set_xlabel("epoch")
        axes.legend(frameon=False)
    left.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def sparsity_and_flops(rows: list[Row]) -> Figure:
    """Sparsity, and FLOPs against the dense network, over the epochs."""
    figure, (left, right) = _figure(2, 9.0, 3.6)
    epochs = [row["epoch"] for row in rows]
    _line(left, epochs, [row["sparsity"] for row in rows], _BLUE, "sparsity")
    left.set_title("Sparsity", loc="left", fontsize=11)
    _line(right, epochs, [row["test_flops_ratio"] for row in rows], _GREEN, "inference, at this epoch")
    _line(right, epochs, [row["train_flops_ratio"] for row in rows], _ORANGE, "training, up to this epoch")
    right.set_title("FLOPs, dense = 100%", loc="left", fontsize=11)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("epoch")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def speed(rows: list[Row]) -> Figure:
    """Training images a second, and how much of the products sparse code computes, over the epochs."""
    shares = {row["epoch"]: row["native_share"] for row in rows if row["native_share"] is not None}
    figure, panels = _figure(2 if shares else 1, 9.0, 3.6)
    _line(panels[0], [row["epoch"] for row in rows], [row["images_per_second"] for row in rows], _BLUE, "images/s")
    panels[0].set_title("Training images/s", loc="left", fontsize=11)
    panels[0].set_ylim(bottom=0)
    if shares:
        _line(panels[1], list(shares), list(shares.values()), _GREEN, "native")
        panels[1].set_title("Products that sparse code computes", loc="left", fontsize=11)
        panels[1].set_ylim(0, 1.02)
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def layer_sparsity(layers: list[dict[str, str]]) -> Figure:
    """The sparsity of each layer as a bar, with its number of weights, and that of all layers together as a line."""
    kept = [int(row["nnz"]) for row in layers]
    numel = [int(row["numel"]) for row in layers]
    figure, (axes,) = _figure(1, 7.5, 1.3 + 0.24 * len(layers))
    places = range(len(layers))
    axes.barh(places, [1 - k / n for k, n in zip(kept, numel, strict=True)], color=_BLUE, height=0.7)
    total = 1 - sum(kept) / sum(numel)
    axes.axvline(total, color=_ORANGE, linewidth=1.5, label=f"all layers: {total:.2%}")
    for place, count in zip(places, numel, strict=True):
        axes.text(1.01, place, f"{count:,}", va="center", fontsize=7, color=_GREY)
    axes.text(1.01, -0.9, "weights", va="center", fontsize=7, color=_GREY)
    axes.set_yticks(places, [row["name"] for row in layers], fontsize=7)
    axes.set_ylim(len(layers) - 0.4, -1.4)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", visible=False)
    axes.set_title("Final sparsity of each layer", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
    return figure


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    panes = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
    for axes in panes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e8eb", linewidth=0.8)
        axes.set_axisbelow(True)
        if panels > 1:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, panes


def _line(axes: Axes, xs: list[int], ys: list[float], colour: str, label: str) -> None:
    axes.plot(xs, ys, color=colour, label=label, linewidth=1.8, marker="o" if len(xs) < 10 else None, markersize=3.5)


def _save(figure: Figure, path: Path) -> Path:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_atomically(path, lambda file: file.write(image.getvalue()))
    return path
