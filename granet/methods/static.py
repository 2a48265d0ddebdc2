"""Static: a random mask that never changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from granet.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """Draw the masks at the start and keep them: what every dynamic method has to beat.

    Source: the "static" baseline of RigL, arXiv:1911.11134, and GraNet, arXiv:2106.10404.
    """

    name: ClassVar[str] = "Static"
    family: ClassVar[str] = "fixed mask"
    source: ClassVar[str] = "arXiv:1911.11134"
    summary: ClassVar[str] = "a random mask drawn at the start and kept"
