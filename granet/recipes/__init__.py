"""The recipes that come with the package: one YAML file per row of a paper's table, and the default one."""

from __future__ import annotations

from pathlib import Path

from granet.names import UsageError, suggestion

FOLDER = Path(__file__).parent
DEFAULT = "digits-granet-0.5-to-0.9"


def recipe_names() -> list[str]:
    """The names that `granet train --recipe` takes, the default one included."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe.

    Raises:
        UsageError: there is no such recipe; the message names the nearest ones.
    """
    names = recipe_names()
    if name not in names:
        raise UsageError(f"unknown recipe {name!r}{suggestion(name, names)} (`granet recipes` lists them all)")
    return FOLDER / f"{name}.yaml"


def recipe_title(name: str) -> str:
    """The first line of the recipe's leading comment."""
    return recipe_path(name).read_text().splitlines()[0].lstrip("# ")
