"""Names that a user types: the error for a wrong one, and the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The command line or a configuration file asks for something that does not exist."""


def suggestion(word: str, known: Iterable[str], most: int = 1) -> str:
    """`; did you mean NAME?` for the `most` known words nearest to `word`, or nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""
