"""Names that a user types: the error for a wrong one, and the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The command line or a configuration file asks for something that does not exist."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` for the known word nearest to `word`, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
