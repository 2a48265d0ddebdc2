"""A Sparsifier's state: packing the masks to bits, and checking a state before it is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from granet.sparsifier import Sparsifier

VERSION = 1
SCHEMA = {
    "method": str,
    "settings": dict,
    "step": int,
    "layers": dict,
    "explored": Tensor | None,
    "generator": Tensor,
}
LAYER_SCHEMA = {"shape": list, "granularity": str, "kept": int, "mask": Tensor}


@dataclass(frozen=True)
class Loaded:
    """A state that was found good."""

    kept: Tensor
    explored: Tensor | None
    generator: Tensor
    step: int


def pack_bits(mask: Tensor) -> Tensor:
    """(n,) bool -> (ceil(n / 8),) uint8 on the CPU; element i is bit i % 8 of byte i // 8."""
    padded = torch.zeros(-(-mask.numel() // 8) * 8, dtype=torch.uint8, device="cpu")
    padded[: mask.numel()] = mask.cpu()
    return (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device="cpu")).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of pack_bits.

    Raises:
        ValueError: `packed` is not uint8 of (ceil(n / 8),), or a bit behind the last element is set.
    """
    if packed.dtype != torch.uint8 or packed.shape != (-(-n // 8),):
        raise ValueError(f"expected {-(-n // 8)} bytes of mask for {n} units, got {tuple(packed.shape)} {packed.dtype}")
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    mask = bits.reshape(-1).bool()
    if bool(mask[n:].any()):
        raise ValueError(f"expected no bit beyond unit {n} of the mask, got some: it is damaged")
    return mask[:n].clone()


def pack(sparsifier: Sparsifier, generator: torch.Generator) -> dict[str, Any]:
    """The state as tensors and plain values, so that `torch.load(weights_only=True)` reads it."""
    layers = {
        layer.name: {
            "shape": list(layer.shape),
            "granularity": str(layer.granularity),
            "kept": layer.kept,
            "mask": pack_bits(layer.granularity.contract(layer.mask)),
        }
        for layer in sparsifier.layers
    }
    return {
        "version": VERSION,
        "method": sparsifier.method.name,
        "settings": _settings(sparsifier),
        "step": sparsifier.step,
        "layers": layers,
        "explored": None if sparsifier.explored is None else pack_bits(sparsifier.explored),
        "generator": generator.get_state(),
    }


def unpack(sparsifier: Sparsifier, state: dict[str, Any]) -> Loaded:
    """Check `state` against the Sparsifier that is to take it.

    Raises:
        ValueError: it belongs to another method, setting or model, or is damaged.
    """
    if not isinstance(state, dict) or state.get("version") != VERSION:
        got = state.get("version") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"expected a Sparsifier state of version {VERSION}, got {got!r}")
    _check_schema(state, SCHEMA, "the Sparsifier state")
    if state["step"] < 0:
        raise ValueError(f"expected a Sparsifier state of step 0 or later, got {state['step']}")
    _check_method(sparsifier, state)
    kept = _unpack_masks(sparsifier, state["layers"])
    explored = state["explored"]
    if sparsifier.explored is not None:
        if explored is None:
            raise ValueError(f"expected the units that {sparsifier.method.name} has explored, got none")
        explored = unpack_bits(explored, kept.numel()).to(sparsifier.explored.device)
    generator = state["generator"].cpu()  # torch.load(map_location=) moves it, too
    try:
        torch.Generator().set_state(generator)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"expected the random state of a generator: {error}; the Sparsifier state is damaged"
        ) from None
    return Loaded(kept, explored, generator, state["step"])


def _check_schema(state: Any, schema: dict[str, Any], what: str) -> None:
    if not isinstance(state, dict) or (missing := schema.keys() - state.keys()):
        lacks = f"lacks {', '.join(sorted(missing))}" if isinstance(state, dict) else f"is a {type(state).__name__}"
        raise ValueError(f"{what} {lacks}: it is damaged")
    for key, kind in schema.items():
        if not isinstance(state[key], kind):
            raise ValueError(f"{what} has a {type(state[key]).__name__} as {key}: it is damaged")


def _settings(sparsifier: Sparsifier) -> dict[str, Any]:
    settings = asdict(sparsifier.method)
    return {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}


def _check_method(sparsifier: Sparsifier, state: dict[str, Any]) -> None:
    method = sparsifier.method
    if state["method"] != method.name:
        raise ValueError(f"expected the state of method {method.name}, got one of {state['method']}")
    here, there = _settings(sparsifier), state["settings"]
    changed = [
        f"{key} is {here.get(key)!r} here and {there.get(key)!r} in the state"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    if changed:
        raise ValueError(f"expected the same settings of {method.name}: " + "; ".join(changed))


def _unpack_masks(sparsifier: Sparsifier, layers: dict[str, Any]) -> Tensor:
    names = [layer.name for layer in sparsifier.layers]
    if names != list(layers):
        odd = sorted(set(names) ^ set(layers)) or names
        raise ValueError(f"expected masks for the {len(names)} sparse layers of this model, got others: {odd[:5]}")
    parts = []
    for layer in sparsifier.layers:
        entry = layers[layer.name]
        _check_schema(entry, LAYER_SCHEMA, f"layer '{layer.name}' in the Sparsifier state")
        here, there = (list(layer.shape), str(layer.granularity)), (entry["shape"], entry["granularity"])
        if here != there:
            raise ValueError(
                f"layer '{layer.name}': expected a mask of {here[0]}, {here[1]}, got {there[0]}, {there[1]}"
            )
        try:
            mask = unpack_bits(entry["mask"], layer.units)
        except ValueError as error:
            raise ValueError(f"layer '{layer.name}': {error}") from None
        if int(mask.sum()) != entry["kept"]:
            raise ValueError(
                f"layer '{layer.name}': expected {entry['kept']} kept units, got {int(mask.sum())}: the mask is damaged"
            )
        parts.append(mask)
    return torch.cat(parts).to(sparsifier.layers[0].weight.device)
