"""Which plan a process follows: one that measures, or one that is fixed, by a rule, by name or by a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from granet_kernels import plan_files
from granet_kernels.layout import SparseLayout
from granet_kernels.plan_times import DENSE, NATIVE, Site

MEASURED, RULE = "measured", "rule"
MODES = (MEASURED, RULE, NATIVE, DENSE)


class Mode:
    """The mode of a process, and what it fixes.

    Args:
        default: the mode to start with. It is checked when it is asked for.
    """

    def __init__(self, default: str) -> None:
        self._name = default
        self._is_checked = False
        self._fixed: plan_files.Choices = {}
        self._generation = 0  # of the fixed plan: a site of another one looks its choices up anew

    def get(self) -> str:
        """One of MODES, or the path of the fixed plan in use.

        Raises:
            ValueError: GRANET_PLAN, which says what to begin with, is neither.
        """
        if not self._is_checked:
            try:
                self.set(self._name)
            except ValueError as error:
                raise ValueError(f"GRANET_PLAN: {str(error).removeprefix('plan: ')}") from None
        return self._name

    def set(self, name: str | os.PathLike[str]) -> None:
        """Use a mode, or a fixed plan from a file, in the whole process.

        Raises:
            ValueError: no such mode, and no such file; or the file holds no plan.
        """
        if name not in MODES:
            if not Path(name).is_file():
                raise ValueError(f"plan: expected {', '.join(MODES)} or a file that plan.save wrote, got {str(name)!r}")
            self._fixed = plan_files.read_choices(Path(name))
        self._name = str(name)
        self._is_checked = True
        self._generation += 1

    @contextmanager
    def use(self, name: str | os.PathLike[str]) -> Iterator[None]:
        """`set` for the body of a with statement."""
        before, fixed = self.get(), self._fixed
        self.set(name)
        try:
            yield
        finally:
            self._name, self._fixed = before, fixed
            self._generation += 1

    def choice(self, site: Site, layout: SparseLayout) -> str:
        """What a plan that measures nothing runs. It leaves the choices of measuring alone."""
        name = self.get()
        if name in (NATIVE, DENSE):
            return name
        if name == RULE:
            return by_rule(site, layout)
        if site.generation != self._generation:
            site.fixed, site.generation = {}, self._generation
        choice = site.fixed.get(layout.bucket)
        if choice is None:
            choice = site.fixed[layout.bucket] = plan_files.choice_at(
                self._fixed.get(site.key, {}), layout.bucket
            ) or by_rule(site, layout)
        return choice


def by_rule(site: Site, layout: SparseLayout) -> str:
    """Native up to the density that the site names."""
    return NATIVE if layout.density <= site.rule_density else DENSE
