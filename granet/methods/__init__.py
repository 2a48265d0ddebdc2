"""The methods. Each is one file and one frozen dataclass; base.py is the contract."""

from __future__ import annotations

import difflib

from granet.methods.base import Exchange, Gradual, Method
from granet.methods.gmp import GMP
from granet.methods.granet import GraNet
from granet.methods.itop import ITOP
from granet.methods.rigl import RigL
from granet.methods.set import SET
from granet.methods.static import Static

_METHODS: tuple[type[Method], ...] = (GraNet, GMP, RigL, ITOP, SET, Static)


def all_methods() -> dict[str, type[Method]]:
    """Every method by its name."""
    return {method.name: method for method in _METHODS}


def get_method(name: str) -> type[Method]:
    """The method of this name, whatever its case.

    Raises:
        ValueError: there is none; the nearest names are suggested.
    """
    by_lower = {key.lower(): method for key, method in all_methods().items()}
    if name.lower() not in by_lower:
        near = difflib.get_close_matches(name.lower(), by_lower, n=1)
        hint = f"did you mean {by_lower[near[0]].name}?" if near else f"there are {', '.join(all_methods())}"
        raise ValueError(f"unknown method {name!r}: {hint}")
    return by_lower[name.lower()]


__all__ = [
    "GMP",
    "ITOP",
    "SET",
    "Exchange",
    "GraNet",
    "Gradual",
    "Method",
    "RigL",
    "Static",
    "all_methods",
    "get_method",
]
