"""What the commands share: the parser, and a console for tables."""

from __future__ import annotations

import argparse
from typing import NoReturn

from rich.console import Console

from granet.names import UsageError, suggestion


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors as UsageError and the nearest name for an unknown option."""

    def error(self, message: str) -> NoReturn:
        marker = "unrecognized arguments: "
        if message.startswith(marker):
            word = message.removeprefix(marker).split()[0]
            message = f"unknown option {word}{suggestion(word, self._option_string_actions)}"
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def table_console() -> Console:
    """stdout, wide enough for a table where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)
