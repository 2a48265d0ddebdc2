"""One update of the masks of all layers, the op granet::update_masks: prune, exchange, restart what does not survive.

It changes masks, weights and optimizer state in place; on the CPU, and on devices for which nothing is registered, by
the exact selections of `topk`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from granet_kernels.checks import check_like
from granet_kernels.topk import topk_mask_op

ROUNDING = 1e-9  # what a product may lie beyond an integer without being rounded to the next one


def update_masks_parts(
    masks: Sequence[Tensor],
    weights: Sequence[Tensor],
    growth: Sequence[Tensor],
    states: Sequence[Tensor],
    owners: Sequence[int],
    fills: Sequence[float],
    keep: Sequence[int] | None,
    ratio: float | None,
    round_up: bool,
    can_grow: Sequence[bool],
    keep_regrown: bool,
) -> Tensor:
    """What the op computes; see `update_masks_`.

    Args:
        owners, fills: of each tensor of `states`, the number of its layer and what a fresh element holds.
        keep: units after the pruning, one number overall or one for each layer.
    """
    weights = [weight.detach() for weight in weights]
    offsets = torch.tensor([0, *accumulate(mask.numel() for mask in masks)], device="cpu")
    kept = torch.cat([mask.reshape(-1) for mask in masks])
    if keep is not None:
        bounds = offsets if len(keep) == len(masks) else offsets[[0, -1]]
        counts = torch.minimum(torch.tensor(keep, dtype=torch.int64, device="cpu"), _kept_units(kept, bounds))
        kept = topk_mask_op(weights, counts, bounds, kept, True)
    totals = _kept_units(kept, offsets)
    final = survivors = kept
    if ratio is not None:
        amounts = [exchanged(total, ratio, round_up) if can else 0 for total, can in _zip(totals.tolist(), can_grow)]
        amount = torch.tensor(amounts, dtype=torch.int64, device="cpu")
        dropped = topk_mask_op(weights, totals - amount, offsets, kept, True)
        final = topk_mask_op(growth, amount, offsets, ~dropped, True) | dropped
        survivors = kept & final if keep_regrown else dropped
    restart = [part.view(mask.shape) for part, mask in _zip((~survivors).split(offsets.diff().tolist()), masks)]
    for mask, part in _zip(masks, final.split(offsets.diff().tolist())):
        mask.copy_(part.view(mask.shape))
    for weight, where in _zip(weights, restart):
        weight.masked_fill_(where, 0)
    for state, owner, fill in zip(states, owners, fills, strict=True):
        state.masked_fill_(restart[owner], fill)
    return totals.to(masks[0].device)


update_masks_op = torch.library.custom_op(
    "granet::update_masks",
    update_masks_parts,
    mutates_args=("masks", "weights", "states"),
    schema="(Tensor(a!)[] masks, Tensor(b!)[] weights, Tensor[] growth, Tensor(c!)[] states, int[] owners, "
    "float[] fills, int[]? keep, float? ratio, bool round_up, bool[] can_grow, bool keep_regrown) -> Tensor",
)


def update_masks_(
    masks: Sequence[Tensor],
    weights: Sequence[Tensor],
    growth: Sequence[Tensor] | None = None,
    states: Sequence[Sequence[Tensor]] | None = None,
    fills: Sequence[Sequence[float]] | None = None,
    *,
    keep: int | Sequence[int] | None = None,
    ratio: float | None = None,
    round_up: bool = False,
    can_grow: Sequence[bool] | None = None,
    keep_regrown: bool = True,
) -> Tensor:
    """Prune, then exchange units of every layer, in place, and restart the weights that do not survive.

    Pruning keeps the `keep` units of largest |weight| among those kept. The exchange drops, of the n units kept in a
    layer then, those of smallest |weight|, and grows as many of largest |growth| among all that are not kept, those
    just dropped included: `ratio` * n, rounded up or down but for an excess of 1e-9. Ties go to the lower index, in
    row-major order whatever the memory format. A unit survives if it is kept before and after; weights of all others
    become 0, and their state the fill.

    Args:
        masks: of each layer, bool of any shape, True = kept.
        weights: float32 of the masks' shapes.
        growth: float32 of the masks' shapes, e.g. dense gradients; needed with a ratio, and None without.
        states: of each layer, tensors of its mask's shape, float32 or bfloat16, e.g. its momentum.
        fills: of each layer, what fresh elements of these tensors hold.
        keep: units after the pruning, one number overall or one for each layer; more than are kept keeps them all.
            None does not prune.
        ratio: of the exchange, in [0, 1]; None does not exchange.
        round_up: whether the number of units exchanged is rounded up.
        can_grow: of each layer, whether it takes part in the exchange; None = all do.
        keep_regrown: whether a unit that is dropped and grown again survives.
    Returns:
        (layers,) int64 on the device of the masks: units kept in each layer.
    Raises:
        ValueError: a length, shape, dtype, device, count or ratio is wrong; nothing is changed then.
    Source: GraNet, arXiv:2106.10404, eq. 1-3; RigL, arXiv:1911.11134.
    """
    _check_layers(masks, weights, growth, ratio)
    states = [()] * len(masks) if states is None else states
    fills = [[0.0] * len(tensors) for tensors in states] if fills is None else fills
    _check_states(masks, states, fills)
    counts = _check_keep(masks, keep)
    flags = [True] * len(masks) if can_grow is None else list(can_grow)
    _check_length("can_grow", flags, masks)
    totals: Tensor = update_masks_op(
        list(masks),
        list(weights),
        list(growth or ()),
        [tensor for tensors in states for tensor in tensors],
        [layer for layer, tensors in enumerate(states) for _ in tensors],
        [float(fill) for values in fills for fill in values],
        counts,
        ratio,
        round_up,
        flags,
        keep_regrown,
    )
    return totals


def exchanged(kept: int, ratio: float, round_up: bool) -> int:
    """Of so many units kept, how many to exchange."""
    return math.ceil(ratio * kept - ROUNDING) if round_up else math.floor(ratio * kept + ROUNDING)


def _zip(*sequences: Sequence[Any]) -> Any:
    return zip(*sequences, strict=True)


def _kept_units(kept: Tensor, offsets: Tensor) -> Tensor:
    """(units,) bool, (S+1,) int64 -> (S,) int64 in CPU memory."""
    return torch.stack([kept[begin:end].count_nonzero() for begin, end in pairwise(offsets.tolist())]).cpu()


def _check_layers(
    masks: Sequence[Tensor], weights: Sequence[Tensor], growth: Sequence[Tensor] | None, ratio: float | None
) -> None:
    if not masks:
        raise ValueError("update_masks_: expected one layer or more, got none")
    if ratio is not None and not 0 <= ratio <= 1:
        raise ValueError(f"update_masks_: expected ratio in [0, 1], got {ratio}")
    if (growth is None) != (ratio is None):
        raise ValueError("update_masks_: expected growth if there is a ratio, and None if there is not")
    for name, tensors, dtype in (
        ("masks", masks, torch.bool),
        ("weights", weights, torch.float32),
        ("growth", masks if growth is None else growth, torch.bool if growth is None else torch.float32),
    ):
        _check_length(name, tensors, masks)
        for layer, (tensor, mask) in enumerate(_zip(tensors, masks)):
            check_like("update_masks_", f"{name}[{layer}]", tensor, dtype, masks[0].device)
            _check_shape(f"{name}[{layer}]", tensor, mask)


def _check_states(
    masks: Sequence[Tensor], states: Sequence[Sequence[Tensor]], fills: Sequence[Sequence[float]]
) -> None:
    _check_length("states", states, masks)
    _check_length("fills", fills, masks)
    for layer, (tensors, values, mask) in enumerate(_zip(states, fills, masks)):
        _check_length(f"fills[{layer}]", values, tensors, "state")
        for tensor in tensors:
            dtype = torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32
            check_like("update_masks_", f"states[{layer}]", tensor, dtype, mask.device)
            _check_shape(f"states[{layer}]", tensor, mask)


def _check_keep(masks: Sequence[Tensor], keep: int | Sequence[int] | None) -> list[int] | None:
    """The numbers of units to keep, as the op takes them."""
    if keep is None:
        return None
    sizes = [mask.numel() for mask in masks]
    if isinstance(keep, int):
        keep, sizes = [keep], [sum(sizes)]
    _check_length("keep", keep, sizes)
    for count, size in _zip(keep, sizes):
        if not 0 <= count <= size:
            raise ValueError(f"update_masks_: expected 0 <= keep <= {size} (units), got {count}")
    return list(keep)


def _check_length(name: str, values: Sequence[Any], others: Sequence[Any], what: str = "layer") -> None:
    if len(values) != len(others):
        raise ValueError(f"update_masks_: expected one of {name} per {what}, {len(others)} in all, got {len(values)}")


def _check_shape(name: str, tensor: Tensor, mask: Tensor) -> None:
    if tensor.shape != mask.shape:
        raise ValueError(
            f"update_masks_: expected {name} of the mask's shape {tuple(mask.shape)}, got shape {tuple(tensor.shape)}"
        )


@update_masks_op.register_fake
def _update_masks_fake(masks: Sequence[Tensor], *args: Any) -> Tensor:
    return masks[0].new_empty(len(masks), dtype=torch.int64)


@register_flop_formula(torch.ops.granet.update_masks)
def _update_masks_flops(*shapes: Any, **kwargs: Any) -> int:
    return 0  # comparisons are no floating-point operations
