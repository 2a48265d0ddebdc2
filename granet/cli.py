"""The `granet` command."""

from __future__ import annotations

import errno
import importlib.metadata
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from granet.cli_tools import Parser, table_console
from granet.interrupt import Interrupted
from granet.names import UsageError, suggestion
from granet.options import parse_config, train_help
from granet.recipes import DEFAULT, recipe_names, recipe_path, recipe_title

COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {}


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `granet`; those of the process by default.
    Returns:
        The exit status: 0; 1 for an error; 2 for a wrong command line; 130 or 143 for a run that Ctrl-C or SIGTERM
        stopped.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        _dispatch(words)
    except UsageError as error:
        return _complain(str(error), 2)
    except Interrupted as stop:
        _say(f"{stop}\ncontinue with: granet train --resume --run-dir {stop.run_dir}")
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 0
    except OSError as error:
        return _complain(_describe(error), 1)
    except torch.OutOfMemoryError as error:
        return _complain(f"{str(error).splitlines()[0]} Lower batch_size, and raise accumulate as much", 1)
    except ValueError as error:
        return _complain(str(error), 1)
    return 0


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help"):
        _print_help()
    elif words[0] == "--version":
        print(f"granet {importlib.metadata.version('granet')}")
    elif words[0] in COMMANDS:
        COMMANDS[words[0]][0](words[1:])
    else:
        raise UsageError(f"unknown command {words[0]!r}{suggestion(words[0], COMMANDS)} (see `granet --help`)")


def _print_help() -> None:
    print("usage: granet COMMAND [OPTIONS]\n\nTrain neural networks that are sparse while they train.\n\ncommands:")
    for name, (_, summary) in COMMANDS.items():
        print(f"  {name:10} {summary}")
    print("\n`granet COMMAND --help` lists a command's options; `granet --version` prints the version.")


def _parser(command: str) -> Parser:
    return Parser(prog=f"granet {command}", description=COMMANDS[command][1] + ".", allow_abbrev=False)


def _add_run_options(parser: Parser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument(
        "--weights", choices=("model", "best"), default="model", help="of the last epoch, or best by validation"
    )


def _train(words: list[str]) -> None:
    parser = Parser(prog="granet train", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--recipe", help=f"a name from `granet recipes`; the default is {DEFAULT}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file in the place of a recipe")
    parser.add_argument("--run-dir", "--run_dir", type=Path, help="folder of the run; by default a new one in runs/")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    options, rest = parser.parse_known_args(words)
    if options.help:
        print(train_help(parser))
        return
    from granet.progress import reporter
    from granet.run import RunFolder
    from granet.trainer import train

    if options.resume and options.run_dir is None:
        raise UsageError("--resume needs --run-dir, the folder of the run to go on with")
    if options.recipe is not None and options.config is not None:
        raise UsageError("--recipe and --config exclude each other")
    if options.resume and options.recipe is None and options.config is None:
        RunFolder(options.run_dir).load_config()
        base = RunFolder(options.run_dir).config_path
    else:
        base = options.config or recipe_path(options.recipe or DEFAULT)
    config = parse_config(rest, base)
    console = Console()
    report = reporter(console)
    if options.recipe is None and options.config is None and not options.resume:
        report.say(f"recipe: {DEFAULT}, the default")
    warnings.formatwarning = lambda message, *_, **__: f"granet: warning: {message}\n"
    summary = train(config, options.run_dir, options.resume, report)
    console.print(summary_text(summary), highlight=False, soft_wrap=True)


def summary_text(summary: dict[str, Any]) -> str:
    """What a finished run has come to, in a few lines."""
    units = ""
    if summary["unit_sparsity"] != summary["sparsity"]:
        units = f" ({summary['unit_sparsity']:.4%} of the units of sparsity)"
    lines = [
        f"test accuracy    {summary['test_accuracy']:.2%} (last epoch)",
        f"sparsity         {summary['sparsity']:.4%}: exactly {summary['nnz']:,} of {summary['numel']:,} weights kept"
        + units,
        f"FLOPs            inference {summary['test_flops_ratio']:.1%}, training {summary['train_flops_ratio']:.1%}"
        " of the dense network's",
        f"speed            {summary['images_per_second']:,.0f} images/s, {summary['seconds']:.1f} s in all",
        f"checkpoint       {summary['checkpoint_bytes']:,} bytes",
    ]
    if summary["native_share"] is not None:
        measuring = f", {summary['plan_seconds']:.1f} s lost on measuring" if summary["plan"] == "measured" else ""
        lines.insert(
            4, f"plan             {summary['plan']}: {summary['native_share']:.0%} of the products natively{measuring}"
        )
    if summary["best_test_accuracy"] is not None:
        best = (
            f"best epoch       {summary['best_epoch']} by validation ({summary['best_validation_accuracy']:.2%}): "
            f"test accuracy {summary['best_test_accuracy']:.2%}"
        )
        lines.insert(1, best)
    if summary["exploration"] is not None:
        lines.append(f"explored         {summary['exploration']:.2%} of the weights were kept at some time (R_s)")
    return "\n".join(lines)


def _recipes(words: list[str]) -> None:
    parser = _parser("recipes")
    parser.add_argument("--show", metavar="NAME", help="print one recipe in full")
    options = parser.parse_args(words)
    if options.show is not None:
        print(recipe_path(options.show).read_text(), end="")
        return
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name:{width}}  {recipe_title(name)}")


def _methods(words: list[str]) -> None:
    _parser("methods").parse_args(words)
    from granet.methods import all_methods

    table = Table(box=None, pad_edge=False)
    for column in ("name", "family", "source", "summary"):
        table.add_column(column, no_wrap=column != "summary")
    for cls in all_methods().values():
        table.add_row(cls.__name__, cls.family, cls.source, cls.summary)
    table_console().print(table)


def _evaluate(words: list[str]) -> None:
    parser = _parser("evaluate")
    _add_run_options(parser)
    parser.add_argument("--data-root", "--data.root", dest="root", help="where the data are, if not as in the run")
    parser.add_argument("--device", help="auto, cpu or cuda, if not as in the run")
    parser.add_argument("--batch-size", "--batch_size", type=int, help="if not as in the run")
    options = parser.parse_args(words)
    from granet.evaluate import evaluate_run

    changes = {name: getattr(options, name) for name in ("root", "device", "batch_size")}
    result = evaluate_run(
        options.run, options.weights, **{name: value for name, value in changes.items() if value is not None}
    )
    print(f"test accuracy {result['test_accuracy']:.2%}, test loss {result['test_loss']:.4f}")


def _export(words: list[str]) -> None:
    parser = _parser("export")
    _add_run_options(parser)
    parser.add_argument("--format", required=True, choices=("dense", "safetensors", "csr", "onnx"))
    parser.add_argument("--output", type=Path, help="the file; by default export.* in the run folder")
    options = parser.parse_args(words)
    from granet.export import export_run

    path = export_run(options.run, options.format, options.output, options.weights)
    print(f"{path}: {path.stat().st_size:,} bytes")


def _doctor(words: list[str]) -> None:
    from granet.cli_doctor import run

    run(_parser("doctor"), words)


def _describe(error: OSError) -> str:
    if error.errno is None or (error.filename is None and not error.strerror):
        return str(error)
    place = f" {error.filename}" if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "; nothing is half-written, checkpoints written before are intact" if full else ""
    return f"{error.strerror}{':' if place else ''}{place}{advice}"


def _complain(message: str, status: int) -> int:
    print(f"granet: error: {message}", file=sys.stderr)
    return status


def _say(message: str) -> None:
    print(message, file=sys.stderr)


COMMANDS |= {
    "train": (_train, "Train one network from a recipe and overrides"),
    "recipes": (_recipes, "List the recipes, or print one"),
    "methods": (_methods, "List the methods"),
    "evaluate": (_evaluate, "Test accuracy of a finished run"),
    "export": (_export, "Write a finished run's network as dense, safetensors, csr or onnx"),
    "doctor": (_doctor, "What of a model can be sparse"),
}
