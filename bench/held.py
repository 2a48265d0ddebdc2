"""What sparse models hold besides weights and optimizer state: their masks, and the index of what is kept."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import granet
from bench.options import model, sparsity
from bench.records import markdown, percent
from bench.step_models import Setting, check_image_size
from granet.methods import Static
from granet.models import create_model
from granet_kernels import plan
from granet_kernels.cpu_backend import library
from granet_kernels.layout import layout_of


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.held", description=__doc__, allow_abbrev=False)
    options.add_argument("--model", nargs="+", type=model, default=["vgg19"], metavar="MODEL")
    options.add_argument("--sparsity", nargs="+", type=sparsity, default=[0.9, 0.95, 0.98], metavar="S")
    args = options.parse_args(argv)
    if library.unavailable() is not None:
        options.error(f"there is no index: {library.unavailable()}")
    try:
        for name in args.model:
            check_image_size(Setting(name, batch=2))
    except ValueError as error:
        options.error(str(error))
    lines = []
    for name in args.model:
        for level in args.sparsity:
            masks, index = held_bytes(name, level)
            lines.append([name, percent(level), f"{masks / 1e6:.1f}", f"{index / 1e6:.1f}"])
    print(markdown(["model, ERK", "sparsity", "masks, MB", "index, MB"], lines))
    return 0


def held_bytes(name: str, level: float) -> tuple[int, int]:
    """Bytes of the masks, and of the indices after a native step on images of 32x32."""
    torch.manual_seed(0)
    network = granet.sparsify(create_model(name, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    sparsifier = granet.Sparsifier(network, optimizer, Static(sparsity=level, total_steps=1))
    with plan.use(plan.NATIVE):
        network(torch.randn(2, 3, 32, 32)).sum().backward()
    native = library.load()
    assert native is not None
    masks = [layer.mask for layer in sparsifier.layers]
    index = [native.granet_layout_bytes(layout_of(mask).native) for mask in masks]
    return sum(mask.numel() for mask in masks), sum(index)


if __name__ == "__main__":
    sys.exit(main())
