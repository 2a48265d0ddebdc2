"""An update of all masks, weights and optimizer state in one op, where the layers are what the op takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

import granet_kernels
from granet.granularity import Unstructured
from granet.methods.base import MaskUpdate
from granet.optimizer_state import StateReset
from granet.topology import Layer

_STATE_DTYPES = (torch.float32, torch.bfloat16)


def update_at_once(
    layers: Sequence[tuple[Layer, Optimizer]], update: MaskUpdate, growth: Tensor | None, has_gradient: Sequence[bool]
) -> bool:
    """Do what Topology and Sparsifier would do one after the other; False, with nothing done, where the op cannot.

    It takes unstructured float32 weights on one device, with state in float32 or bfloat16. `nnz` of the layers follows.

    Args:
        layers: each with the optimizer that holds its weight.
        growth: (units,) float32, |dense gradient|; needed for an exchange.
        has_gradient: of each layer, whether it has one.
    """
    states = _states(layers)
    if states is None or not _takes([layer for layer, _ in layers]) or (update.ratio is not None and growth is None):
        return False
    exchanged = None
    if update.ratio is not None and growth is not None:
        parts = growth.split([layer.numel for layer, _ in layers])
        exchanged = [part.view(layer.shape) for part, (layer, _) in zip(parts, layers, strict=True)]
    with torch.no_grad():
        totals = granet_kernels.update_masks_(
            [layer.mask for layer, _ in layers],
            [layer.weight for layer, _ in layers],
            exchanged,
            [[tensor for tensor, _ in tensors] for tensors in states],
            [[fill for _, fill in tensors] for tensors in states],
            keep=update.keep,
            ratio=update.ratio,
            round_up=update.round_up,
            can_grow=has_gradient if update.ratio is not None else None,
            keep_regrown=update.keep_regrown,
        )
    for (layer, _), total in zip(layers, totals.tolist(), strict=True):
        layer.kept = total
    return True


def _takes(layers: Sequence[Layer]) -> bool:
    device = layers[0].weight.device
    return all(
        isinstance(layer.granularity, Unstructured)
        and layer.weight.dtype == torch.float32
        and layer.weight.device == device
        for layer in layers
    )


def _states(layers: Sequence[tuple[Layer, Optimizer]]) -> list[list[tuple[Tensor, float]]] | None:
    """Of each layer, the state that restarts with a weight and what is fresh there; None if the op does not take it."""
    reset, states = StateReset(), []
    for layer, optimizer in layers:
        fresh = reset.fresh(optimizer, layer.weight)
        if fresh is None or any(
            state.dtype not in _STATE_DTYPES or state.device != layer.weight.device for state, _ in fresh
        ):
            return None
        states.append(fresh)
    return states
