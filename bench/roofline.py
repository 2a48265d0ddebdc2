"""What a GPU allows a sparse linear layer at best: the longest of three times, each a count over a rate.

    arithmetic    2 * n * nnz                                 FLOP  over the rate of the units that do it
    memory        size * (n * in + n * out + nnz) + index     bytes over the bandwidth of the memory
    gathering     size * n * nnz / block                      bytes over the bandwidth of a cache

n, in and out are those of x (n, in) and of the weight (out, in), size is the bytes of a number, and the index takes 4
bytes a kept block. Blocks are multiplied by the tensor cores, and each row of a block shares the activations that come
from the second-level cache. Single weights, blocks of 1, are multiplied by the float32 units, each with activations of
its own from the first-level cache, at 128 bytes a cycle and multiprocessor. The three directions count alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.records import RESULTS, Row, append, markdown

CACHE_BYTES = 128  # a cycle and multiprocessor, on all chips here
SIZES = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Chip:
    """A GPU, by its data sheet or as measured.

    Attributes:
        multiprocessors, clock: how many, and in Hz.
        memory, second_level: bytes a second from the memory, and from the second-level cache.
        rates: FLOP a second of dense products by kind, "float32" (IEEE), "tf32", "bfloat16" or "float16".
    """

    name: str
    multiprocessors: int
    clock: float
    memory: float
    second_level: float
    rates: dict[str, float]

    @property
    def first_level(self) -> float:
        """Bytes a second from all first-level caches."""
        return self.multiprocessors * CACHE_BYTES * self.clock


SHEETS = (
    Chip("V100 SXM2", 80, 1.53e9, 0.9e12, 3.1e12, {"float32": 15.7e12, "float16": 125e12}),
    Chip("A100 SXM 80 GB", 108, 1.41e9, 2.04e12, 7.2e12, {"float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12}),
    Chip("H200 SXM", 132, 1.98e9, 4.8e12, 5.5e12, {"float32": 67e12, "tf32": 494e12, "bfloat16": 989e12}),
)
"""By NVIDIA's data sheets, without structured sparsity; clocks are those at which the sheets' float32 rates hold. The
second level: 5,120 bytes a cycle on an A100, and 2.3 times a V100's, by the A100 whitepaper; of an H200, what others
have measured."""

EFFICIENCY = {"dense": 0.8, "block": 0.65, "single": 0.55}
"""Shares of the bound that are expected of cuBLAS, of block-sparse kernels, and of single weights. Assumptions."""


@dataclass(frozen=True)
class Product:
    """One direction of a linear layer.

    Attributes:
        n, inputs, outputs: examples, in, out.
        kept: share of the weights kept.
        block: rows and columns of a block, or 1.
        dtype: of the operands; "tf32" is float32 on tensor cores.
    """

    n: int
    inputs: int
    outputs: int
    kept: float
    block: int
    dtype: str

    @property
    def nnz(self) -> int:
        return round(self.kept * self.inputs * self.outputs)

    @property
    def flops(self) -> int:
        return 2 * self.n * self.nnz

    @property
    def bytes(self) -> int:
        """Moved through memory at least."""
        numbers = self.n * self.inputs + self.n * self.outputs + self.nnz
        return SIZES[self.dtype] * numbers + 4 * self.nnz // self.block**2

    @property
    def gathered(self) -> int:
        """Bytes of activations that come from a cache."""
        return SIZES[self.dtype] * self.n * self.nnz // self.block


def bounds(product: Product, chip: Chip) -> dict[str, float]:
    """Seconds by "arithmetic", "memory" and "gathering"."""
    rate = chip.rates["float32"] if product.block == 1 else chip.rates[product.dtype]
    return {
        "arithmetic": product.flops / rate,
        "memory": product.bytes / chip.memory,
        "gathering": product.gathered / (chip.first_level if product.block == 1 else chip.second_level),
    }


def floor(product: Product, chip: Chip) -> tuple[str, float]:
    """Which bound is the longest, and its seconds."""
    return max(bounds(product, chip).items(), key=lambda item: item[1])


def dense_seconds(product: Product, chip: Chip) -> float:
    """Of the dense product, by the data sheet's rate."""
    return 2 * product.n * product.inputs * product.outputs / chip.rates[product.dtype]


COLUMNS = ("chip", "dtype", "granularity", "sparsity", "bound", "speedup_at_bound", "speedup_expected", "origin")


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__, allow_abbrev=False)
    options.add_argument("--csv", type=Path, default=RESULTS / "roofline.csv", metavar="FILE", help="written anew")
    options.add_argument("--size", type=int, default=4096, metavar="N", help="n, in and out (default 4096)")
    args = options.parse_args(argv)
    if args.size < 1:
        options.error(f"--size: expected 1 or more, got {args.size}")
    rows = [
        _row(chip, Product(args.size, args.size, args.size, kept, block, dtype))
        for chip in SHEETS
        for dtype in chip.rates
        for block in (1, 32, 64, 128)
        for kept in (0.1, 0.05, 0.02)
        if block == 1 or dtype != "float32"
    ]
    args.csv.unlink(missing_ok=True)
    append(args.csv, COLUMNS, rows)
    print(summary(rows))
    return 0


def _row(chip: Chip, product: Product) -> Row:
    """The speed-up over the dense product in the same dtype: at the bound, and at the expected share of it."""
    bound, seconds = floor(product, chip)
    at_bound = dense_seconds(product, chip) / seconds
    share = EFFICIENCY["single" if product.block == 1 else "block"] / EFFICIENCY["dense"]
    return {
        "chip": chip.name,
        "dtype": product.dtype,
        "granularity": "unstructured" if product.block == 1 else f"block {product.block}",
        "sparsity": 1 - product.kept,
        "bound": bound,
        "speedup_at_bound": at_bound,
        "speedup_expected": at_bound * share,
        "origin": "computed from the data sheet, not measured",
    }


def summary(rows: Sequence[Row]) -> str:
    """Markdown: one line a chip, dtype and granularity, the expected speed-ups by sparsity."""
    lines: dict[tuple[str, str, str], dict[float, str]] = {}
    for row in rows:
        key = row["chip"], row["dtype"], row["granularity"]
        lines.setdefault(key, {})[row["sparsity"]] = f"{row['speedup_expected']:.2g}x"
    levels = sorted({row["sparsity"] for row in rows})
    header = ["computed, not measured", "dense in", "sparse", *(f"{level:.0%}" for level in levels)]
    return markdown(header, [[*key, *(found[level] for level in levels)] for key, found in lines.items()])


if __name__ == "__main__":
    sys.exit(main())
