"""The files of the plan: times measured on this machine, and the choices of a fixed plan. Both are JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import secrets
import warnings
from pathlib import Path
from typing import Any

import torch

from granet_kernels.cpu_backend import library

FORMAT = 1  # of a fixed plan
TIMES_FORMAT = 2
_MOST_ENTRIES = 20_000  # of one machine; the oldest go first
_MOST_MACHINES = 16  # every build of the kernels counts as one; those that were not written for longest go first

Entries = dict[str, dict[str, Any]]
Choices = dict[str, dict[int, str]]


def cache_path() -> Path | None:
    """Where measured times are kept: GRANET_PLAN_CACHE, or granet/plan.json in the user's cache.

    None if the variable is "", or the user has no home.
    """
    named = os.environ.get("GRANET_PLAN_CACHE")
    if named is not None:
        return Path(named) if named else None
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return None
    return root / "granet" / "plan.json"


def machine() -> str:
    """What the times depend on besides shape and density: processor, instruction set, torch and the kernels."""
    kernels = f"kernels {library.ABI_VERSION} {library.digest()}"
    return f"{processor()} {library.isa()}, torch {torch.__version__}, {kernels}"


def processor() -> str:
    """The name of the processor; with family and model, as virtual machines call them all alike."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    if "cpu family" not in fields or "model" not in fields:
        return fields["model name"]
    return f"{fields['model name']} family {fields['cpu family']} model {fields['model']}"


def read_times(path: Path) -> Entries:
    """The times of this machine; none, with a warning, if the file is damaged, and none if there is no file."""
    return _read_cache(path).get(machine(), {})


def write_times(path: Path, entries: Entries) -> bool:
    """Put the times of this machine beside what others have written; False if the place cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        machines = _read_cache(path)
        merged = {**machines.pop(machine(), {}), **entries}
        machines[machine()] = dict(list(merged.items())[-_MOST_ENTRIES:])
        _write(path, {"format": TIMES_FORMAT, "machines": dict(list(machines.items())[-_MOST_MACHINES:])})
    except OSError:
        return False
    return True


def read_choices(path: Path) -> Choices:
    """The choices of a fixed plan.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no plan.
    """
    try:
        data = json.loads(path.read_bytes())
        choices = {key: {int(b): choice for b, choice in by.items()} for key, by in data["choices"].items()}
        sound = data["format"] == FORMAT and all(
            c in ("dense", "native") for by in choices.values() for c in by.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"expected a plan as plan.save writes it, got {path}")
    return choices


def choice_at(choices: dict[int, str], bucket: int) -> str | None:
    """The choice for a density, or what follows from its neighbours: sparser is native's side, denser is dense's."""
    if bucket in choices:
        return choices[bucket]
    if any(known < bucket and choice == "native" for known, choice in choices.items()):
        return "native"
    return "dense" if any(known > bucket and choice == "dense" for known, choice in choices.items()) else None


def write_choices(path: Path, choices: Choices) -> None:
    """Write a fixed plan.

    Raises:
        OSError: the file cannot be written.
    """
    _write(path, {"format": FORMAT, "choices": choices})


def _read_cache(path: Path) -> dict[str, Entries]:
    try:
        data = json.loads(path.read_bytes())
        machines: dict[str, Entries] = data["machines"]
        if data["format"] == TIMES_FORMAT and all(
            _is_sound(e) for entries in machines.values() for e in entries.values()
        ):
            return machines
    except OSError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    warnings.warn(f"{path} holds no measured times: it is left aside, and replaced", RuntimeWarning, stacklevel=2)
    return {}


def _is_sound(entry: dict[str, Any]) -> bool:
    times = [seconds for window in (entry["dense"], *entry["native"].values()) for seconds in window]
    return all(int(bucket) >= 0 for bucket in entry["native"]) and all(0 < t < math.inf for t in times)


def _write(path: Path, data: dict[str, Any]) -> None:
    # Process ids are not enough: containers that share the folder all have a process 1, and threads share theirs.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
