"""Time one GraNet update of ResNet-50 on a GPU: prune over all layers, exchange in each, restart weights and momentum.

Peers: the same op by selections one after the other, and what other libraries do, torch.topk over all weights and then
in each layer. `floor` counts what 12 launches read and write at least, 44 bytes a weight, over the bandwidth of a copy:
prune 4 + 1 to bracket and collect, 4 + 2 for what is kept, the same for drop and for grow, 14 to write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torchvision
from torch import Tensor

from bench import gpu
from bench.records import TIMES, Row, append, markdown
from bench.verify import WrongResultError
from granet_kernels.event import exchanged, update_masks_parts
from granet_kernels.triton_backend.event import update_masks_triton

COLUMNS = ("model", "layers", "weights", "implementation", *TIMES, "bytes", "floor_ms", "of_floor", *gpu.MACHINE)
BYTES = 44
DENSITY, RATIO = 0.2, 0.3
_DRY_SHAPES = [(8, 3, 3, 3), (16, 8, 1, 1), (5, 16)]


def main(argv: Sequence[str] | None = None) -> int:
    options = gpu.parser(__doc__, "event_gpu")
    args = options.parse_args(argv)
    try:
        on = gpu.device(args.dry)
    except ValueError as error:
        options.error(str(error))
    about = gpu.described(on)
    copied = gpu.bandwidth(on, args.dry)
    shapes = _DRY_SHAPES if args.dry else resnet50_shapes()
    network = Network(shapes, on)
    network.check()
    runs: dict[str, Callable[[], object]] = {
        "granet": partial(network.update, update_masks_triton),
        "granet, selection by selection": partial(network.update, update_masks_parts),
        "torch.topk by layer": network.update_by_torch,
    }
    times = gpu.alternate(runs, on, 2 if args.dry else 50, args.seconds)
    weights = sum(mask.numel() for mask in network.masks)
    floor = BYTES * weights / copied
    rows: list[Row] = [
        {
            "model": "some layers" if args.dry else "resnet50",
            "layers": len(shapes),
            "weights": weights,
            "implementation": name,
            **timing.columns(),
            "bytes": BYTES * weights,
            "floor_ms": 1000 * floor,
            "of_floor": timing.median / floor,
            **about,
        }
        for name, timing in times.items()
    ]
    append(args.csv, COLUMNS, rows)
    print(summary(rows))
    return 0


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Of the convolutions and the classifier."""
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    return [tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() > 1]


class Network:
    """Masks, weights, gradients and momentum of all layers. Each update prunes to DENSITY and exchanges RATIO."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], on: torch.device) -> None:
        generator = torch.Generator(on).manual_seed(0)
        draw = partial(torch.randn, generator=generator, device=on)
        self.weights, self.growth, self.momentum = ([draw(shape) for shape in shapes] for _ in range(3))
        self.masks = [draw(shape) > 0 for shape in shapes]
        self.keep = round(DENSITY * sum(mask.numel() for mask in self.masks))

    def update(self, implementation: Callable[..., Tensor]) -> Tensor:
        """One update, by the op or what it is held against; units kept in each layer."""
        layers = range(len(self.masks))
        lists = self.masks, self.weights, self.growth, self.momentum
        return implementation(
            *lists, list(layers), [0.0 for _ in layers], [self.keep], RATIO, True, [True for _ in layers], True
        )

    def update_by_torch(self) -> None:
        """Thresholds by torch.topk, layer by layer, each waiting for the counts; ties are cut as they come."""
        scores = torch.cat([(weight.abs() * mask).flatten() for weight, mask in self._pairs()])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.topk(self.keep, sorted=False).indices] = True
        parts = kept.split([mask.numel() for mask in self.masks])
        for mask, weight, grad, momentum, part in zip(
            self.masks, self.weights, self.growth, self.momentum, parts, strict=True
        ):
            total = int(part.count_nonzero())
            amount = exchanged(total, RATIO, True)
            order = torch.where(part, weight.abs().flatten(), -1.0)
            left = torch.zeros_like(part)
            left[order.topk(total - amount, sorted=False).indices] = True
            grown = torch.where(left, -1.0, grad.abs().flatten()).topk(amount, sorted=False).indices
            final = left.clone()
            final[grown] = True
            survivors = (part & final).view(mask.shape)
            mask.copy_(final.view(mask.shape))
            weight.mul_(survivors)
            momentum.mul_(survivors)

    def check(self) -> None:
        """Raise WrongResultError unless one update is what the op is specified to do, on copies in CPU memory."""
        here = Network.__new__(Network)
        here.keep = self.keep
        for name in ("masks", "weights", "growth", "momentum"):
            setattr(here, name, [each.cpu().clone() for each in getattr(self, name)])
        expected, totals = here.update(update_masks_parts), self.update(update_masks_triton)
        pairs = [(totals, expected)]
        for name in ("masks", "weights", "momentum"):
            pairs += zip(getattr(self, name), getattr(here, name), strict=True)
        wrong = sum(not torch.equal(got.cpu(), correct) for got, correct in pairs)
        if wrong:
            raise WrongResultError(f"expected the reference's masks, weights and momentum, got {wrong} other tensors")

    def _pairs(self) -> zip[tuple[Tensor, Tensor]]:
        return zip(self.weights, self.masks, strict=True)


def summary(rows: Sequence[Row]) -> str:
    """Markdown: one line an implementation."""
    header = ["one update of all masks", "layers", "weights", "ms", "20 to 80 %", "times the floor"]
    lines = [
        [
            row["implementation"],
            str(row["layers"]),
            f"{row['weights']:,}",
            f"{row['ms_median']:.3f}",
            f"{row['ms_p20']:.3f} to {row['ms_p80']:.3f}",
            f"{row['of_floor']:.2f}x",
        ]
        for row in rows
    ]
    return markdown(header, lines)


if __name__ == "__main__":
    sys.exit(main())
