"""`granet doctor`: what of a model can be sparse, and how fast it is then."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from granet.cli_tools import Parser, table_console
from granet.doctor import Diagnosis, examine
from granet.speed import LayerSpeed
from granet_kernels.cpu_backend import library


def run(parser: Parser, words: list[str]) -> None:
    """Examine the model that the words name, and print what was found."""
    parser.add_argument("model", metavar="MODEL", help="a name such as vgg19, resnet50-cifar or resnet50")
    parser.add_argument("--input", type=_shape, metavar="CxHxW", help="shape of an image, e.g. 3x32x32")
    parser.add_argument("--num-classes", "--num_classes", type=int, default=10)
    parser.add_argument("--sparsity", type=float, default=0.9, help="for the preview of the distributions")
    parser.add_argument("--granularity", default="unstructured", help="unstructured, block:64x32, 2:4 or filter")
    parser.add_argument("--batch", type=int, default=128, help="images of one batch, for the times")
    parser.add_argument(
        "--no-measure", "--no_measure", action="store_true", help="leave out the times: seconds to minutes"
    )
    options = parser.parse_args(words)
    batch = None if options.no_measure else options.batch
    with Console(stderr=True).status("building the model", refresh_per_second=2) as status:  # on terminals only
        found = examine(
            options.model,
            options.input,
            options.num_classes,
            options.sparsity,
            options.granularity,
            batch,
            lambda name: status.update(f"measuring {name}"),
        )
    console = table_console()
    console.print(_table(found, with_times=batch is not None))
    weights = sum(layer.weights for layer in found.layers)
    console.print(
        f"{found.model} on images {'x'.join(map(str, found.image_shape))}: {found.parameters:,} parameters, "
        f"{weights:,} of them in {len(found.layers)} layers that can be sparse; {found.macs:,} MACs an image"
    )
    console.print(
        f"FLOPs at sparsity {options.sparsity:.0%}, dense = 100%: ERK {found.flops_ratio['erk']:.1%}, "
        f"uniform {found.flops_ratio['uniform']:.1%}"
    )
    if found.speedup is not None:
        console.print(
            f"measured on batches of {batch}, forward and backward, against dense layers in NCHW or channels_last, "
            f"whichever is faster: all of them together {found.speedup:.2f}x at sparsity {options.sparsity:.0%} "
            "with ERK"
        )
    console.print(_native_text())


def _table(found: Diagnosis, with_times: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for column in ("shape", "weights", "MACs", "kept by ERK", "kept by uniform"):
        table.add_column(column, justify="right", no_wrap=True)
    if with_times:
        table.add_column("runs", no_wrap=True)
        for column in ("speed-up", "wins from"):
            table.add_column(column, justify="right", no_wrap=True)
    for layer in found.layers:
        shares = (
            ("does not fit, exclude it: " + layer.problem, "")
            if layer.problem is not None
            else tuple("-" if share is None else f"{share:.2%}" for share in (layer.erk, layer.uniform))
        )
        shape = "x".join(map(str, layer.shape))
        speed = () if not with_times or layer.problem is not None else _speed_cells(layer.speed)
        table.add_row(layer.name, shape, f"{layer.weights:,}", f"{layer.macs:,}", *shares, *speed)
    return table


def _speed_cells(speed: LayerSpeed | None) -> tuple[str, str, str]:
    """What runs, how much faster than dense it is, the sparsity from which native code wins."""
    if speed is None:
        return "dense, masked gradient", "", ""
    wins = "never" if speed.break_even is None else f"{speed.break_even:.0%}"
    return speed.implementation, f"{speed.speedup:.2f}x", wins


def _native_text() -> str:
    reason = library.unavailable()
    if reason is not None:
        return f"native CPU code: none, {reason}"
    return f"native CPU code: {library.isa()}, threads: {library.threads()}"


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected CHANNELSxHEIGHTxWIDTH such as 3x32x32, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])
