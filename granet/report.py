"""The table that print(sparsifier) shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from granet_kernels import plan

if TYPE_CHECKING:
    from granet.sparsifier import Sparsifier
    from granet.topology import Layer

HEADER = ("layer", "shape", "granularity", "kept", "weights", "sparsity", "implementation", "speed-up", "wins from")


def rows(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """One row a layer, with the numbers as numbers."""
    return [
        {
            "name": layer.name,
            "shape": list(layer.shape),
            "granularity": str(layer.granularity),
            "nnz": layer.nnz,
            "numel": layer.numel,
            "sparsity": layer.sparsity,
            "implementation": layer.implementation,
            "speedup": layer.speedup,
            "break_even": layer.break_even,
        }
        for layer in layers
    ]


def text(sparsifier: Sparsifier) -> str:
    """The rows as aligned text, with the method above, and below the sum and what a measured plan has cost."""
    method = sparsifier.method
    lines = [HEADER] + [
        (
            row["name"] or "(model)",
            "x".join(map(str, row["shape"])),
            row["granularity"],
            f"{row['nnz']:,}",
            f"{row['numel']:,}",
            f"{row['sparsity']:.2%}",
            row["implementation"],
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            "" if row["break_even"] is None else f"{row['break_even']:.0%}",
        )
        for row in rows(sparsifier.layers)
    ]
    lines.append(
        ("all", "", "", f"{sparsifier.nnz:,}", f"{sparsifier.numel:,}", f"{sparsifier.sparsity:.2%}", *[""] * 3)
    )
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    numbers = {3, 4, 5, 7, 8}
    body = [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    title = (
        f"{method.name} at step {sparsifier.step:,}: sparsity {sparsifier.sparsity:.2%}, target {method.sparsity:.2%}"
    )
    measures = any(layer.implementations for layer in sparsifier.layers) and plan.mode() == plan.MEASURED
    return "\n".join([title, *body, *([str(plan.summary())] if measures else [])])
