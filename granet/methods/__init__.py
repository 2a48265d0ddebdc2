"""The methods. Each is one file and one frozen dataclass; base.py is the contract."""

from __future__ import annotations

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
]
