"""The command line and the YAML files of `granet train`, parsed into a TrainConfig."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from granet.config import LrSchedule, Optimizer, TrainConfig
from granet.methods import Method, all_methods
from granet.names import UsageError, suggestion

_CHOICES: dict[str, type] = {"method": Method, "optimizer": Optimizer, "lr_schedule": LrSchedule}
_DEFAULTS = {key: type(getattr(TrainConfig(), key)).__name__ for key in _CHOICES}


def build_parser() -> ArgumentParser:
    """The parser of every field of TrainConfig, and of --config FILE.

    The fields that hold one of several classes have no default here: the parser would keep the values of the default
    class for any other class that is chosen.
    """
    set_parsing_settings(subclasses_enabled=list(_CHOICES.values()))
    parser = ArgumentParser(prog="granet train", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file like those that `granet recipes --show` prints")
    parser.add_class_arguments(TrainConfig, None, as_group=False)
    parser.set_defaults(dict.fromkeys(_CHOICES))
    return parser


def parse_config(arguments: list[str], base: Path | None = None) -> TrainConfig:
    """Read a configuration from command-line arguments.

    Args:
        arguments: e.g. ["--epochs", "3", "--method", "RigL"]; dashes in names may stand for underscores.
        base: a YAML file whose values the arguments override. Where they choose another class (--method RigL), the
            values that the file gives and that class knows are kept; all others are the class's own defaults.
    Raises:
        FileNotFoundError: there is no file at `base`.
        UsageError: an unknown option, an unknown class, or a value that does not fit; with the nearest name.
    """
    parser = build_parser()
    given = _with_names(_with_lists([_with_underscores(argument) for argument in arguments]))
    document = _with_choices({} if base is None else _read_document(base), given)
    given = ["--config", yaml.safe_dump(document), *given]
    try:
        # The parser also prints what it raises.
        with contextlib.redirect_stderr(io.StringIO()):
            values = parser.instantiate(parser.parse_args(given))
        config = TrainConfig(**{item.name: values[item.name] for item in dataclasses.fields(TrainConfig)})
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise UsageError(_explain(str(error), given)) from None
    if config.data.root is None:
        return config
    root = str(Path(config.data.root).expanduser().absolute())  # a run may be resumed from another folder
    return dataclasses.replace(config, data=dataclasses.replace(config.data, root=root))


def train_help(own: argparse.ArgumentParser) -> str:
    """The help of `granet train`: the options of `own`, then those of a configuration."""
    own_options = own.format_help().partition("options:")[2].strip("\n")
    fields = build_parser().format_help().partition("options:")[2].strip("\n")
    for base in _CHOICES.values():  # the parser names every class, those that are only bases of others too
        names = ", ".join(subclasses(base))
        fields = re.sub(rf"\(type: <class '{base.__name__}'>[^)]*\)", f"({names})", fields)
    return (
        "usage: granet train [--recipe NAME] [--run-dir DIR] [--resume] [--FIELD VALUE ...]\n\n"
        "Train one network. Every field of the recipe can be overridden, e.g.\n"
        "  granet train --recipe vgg19-cifar10-granet-0.5-to-0.9 --data.root ~/data --epochs 3\n"
        f"  granet train --method RigL --method.sparsity 0.8\n\noptions:\n{own_options}\n\nfields:\n{fields}"
    )


def load_config(path: Path) -> TrainConfig:
    """Read a configuration from a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        UsageError: its content is not a configuration.
    """
    try:
        return parse_config([], base=path)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _read_document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        document = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UsageError(f"expected fields with values, got {type(document).__name__}")
    return document


def _with_choices(document: dict[str, Any], given: list[str]) -> dict[str, Any]:
    """The document with the class of each field of _CHOICES filled in: the chosen one, its own, or the default."""
    document = dict(document)
    for key, base in _CHOICES.items():
        entry = document.get(key) or {"class_path": _DEFAULTS[key]}
        entry = {"class_path": entry} if isinstance(entry, str) else entry
        cls = subclasses(base).get(_value_of(key, given) or "")
        if cls is not None and isinstance(entry, dict) and entry.get("class_path") != cls.__name__:
            known = {item.name for item in dataclasses.fields(cls)}
            values = entry.get("init_args") or {}
            kept = {name: value for name, value in values.items() if name in known}
            entry = {"class_path": cls.__name__, "init_args": kept}
        document[key] = entry
    return document


def _with_underscores(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _with_names(arguments: list[str]) -> list[str]:
    """The arguments with the names of classes (--method rigl) in their right case."""
    result = list(arguments)
    for key, base in _CHOICES.items():
        names = {name.lower(): name for name in subclasses(base)}
        for index, argument in enumerate(arguments):
            if argument.startswith(f"--{key}="):
                value = argument.partition("=")[2]
                result[index] = f"--{key}={names.get(value.lower(), value)}"
            elif index and arguments[index - 1] == f"--{key}":
                result[index] = names.get(argument.lower(), argument)
    return result


def _with_lists(arguments: list[str]) -> list[str]:
    """The arguments with `--log a,b` written as the list that the parser wants."""
    names = [f"--{item.name}" for item in dataclasses.fields(TrainConfig) if item.type == "list[str]"]
    result: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in names:
            result.append(f"{name}={_as_list(value)}")
        else:
            result.append(_as_list(argument) if result and result[-1] in names else argument)
    return result


def _as_list(value: str) -> str:
    return value if value.startswith("[") else json.dumps([part.strip() for part in value.split(",")])


def subclasses(base: type) -> dict[str, Any]:
    """The classes that an option of type `base` may name."""
    if base is Method:
        return {cls.__name__: cls for cls in all_methods().values()}
    known: list[type] = base.__subclasses__()
    return {cls.__name__: cls for cls in known}


def _explain(message: str, given: list[str]) -> str:
    """The parser's message as one line, with the nearest name where a name is wrong."""
    unknown = re.search(r"unrecognized arguments: --(\S+)", message)
    if unknown:
        name = unknown[1].split("=")[0]
        parts = [option for option in _option_names() if option.endswith(f".{name}")]
        return f"unknown option --{name}" + (
            f"; did you mean {parts[0]}?" if parts else suggestion(name, _option_names())
        )
    key = re.search(r'[Pp]arser key "(\w+)"', message)
    refused = re.search(r"Option '([\w.]+)' is not accepted", message)
    if refused and key and key[1] in _CHOICES:
        chosen = re.search(r"class_path '(?:[\w.]+\.)?(\w+)'", message)
        cls: Any = subclasses(_CHOICES[key[1]]).get(chosen[1]) if chosen else None
        options = [item.name for item in dataclasses.fields(cls)] if cls else []
        title = cls.__name__ if cls else key[1]
        return f"{key[1]} {title} has no option {refused[1]!r}{suggestion(refused[1], options)}"
    if key and key[1] in _CHOICES:
        value = _value_of(key[1], given)
        names = list(subclasses(_CHOICES[key[1]]))
        if value is not None and value not in names and "." not in value:
            return f"unknown {key[1]} {value!r}{suggestion(value, names)} (known: {', '.join(names)})"
    return _shortened(" ".join(message.split()))


def _shortened(message: str) -> str:
    """The parser's message on a value of the wrong type, in the form of our own errors."""
    message = re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", message)
    message = re.sub(r"^(\w+): Problem with given class_path '[^']*': Parser key \"(\w+)\": ", r"\1.\2: ", message)
    literal = re.match(r"([\w.]+): Expected a typing.Literal\[(.*?)\]\. Got value: (.*)", message)
    if literal:
        return f"{literal[1]}: expected {literal[2].replace(', ', ' or ')}, got {literal[3]!r}"
    message = re.sub(r"Expected a <class '(\w+)'>\. Got value: (.*)", r"expected \1, got '\2'", message)
    union = re.fullmatch(r"([\w.]+): Does not validate .*?Subtypes: \[(.*?)\] .*Given value: (.*)", message)
    if union:
        kinds = [kind.replace("NoneType", "null") for kind in re.findall(r"<class '(\w+)'>", union[2])]
        return f"{union[1]}: expected {' or '.join(kinds)}, got {union[3]!r}"
    return message


def _value_of(key: str, given: list[str]) -> str | None:
    """The last value that the arguments give for --key."""
    value = None
    for index, argument in enumerate(given):
        if argument == f"--{key}" and index + 1 < len(given):
            value = given[index + 1]
        elif argument.startswith(f"--{key}="):
            value = argument.partition("=")[2]
    return value


def _option_names() -> list[str]:
    names: list[str] = ["recipe", "run_dir", "resume", "config", "help"]
    for item in dataclasses.fields(TrainConfig):
        names.append(item.name)
        classes: list[type] = []
        if item.name in _CHOICES:
            classes = list(subclasses(_CHOICES[item.name]).values())
        elif item.default_factory is not dataclasses.MISSING and dataclasses.is_dataclass(item.default_factory):
            classes = [item.default_factory]
        names += [f"{item.name}.{sub.name}" for cls in classes for sub in dataclasses.fields(cls)]
    return names
