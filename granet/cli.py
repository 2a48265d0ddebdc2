"""The `granet` command."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

from granet.interrupt import Interrupted
from granet.names import UsageError, suggestion
from granet.options import parse_config, train_help
from granet.recipes import DEFAULT, recipe_names, recipe_path, recipe_title

if TYPE_CHECKING:
    from granet.speed import LayerSpeed

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


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with errors as UsageError and the nearest name for an unknown option."""

    def error(self, message: str) -> NoReturn:
        marker = "unrecognized arguments: "
        if message.startswith(marker):
            word = message.removeprefix(marker).split()[0]
            message = f"unknown option {word}{suggestion(word, self._option_string_actions)}"
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def _parser(command: str) -> _Parser:
    return _Parser(prog=f"granet {command}", description=COMMANDS[command][1] + ".", allow_abbrev=False)


def _add_run_options(parser: _Parser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument(
        "--weights", choices=("model", "best"), default="model", help="of the last epoch, or best by validation"
    )


def _train(words: list[str]) -> None:
    parser = _Parser(prog="granet train", add_help=False, allow_abbrev=False)
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
    _table_console().print(table)


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
    parser = _parser("doctor")
    parser.add_argument("model", metavar="MODEL", help="a name such as vgg19, resnet50-cifar or resnet50")
    parser.add_argument("--input", type=_shape, metavar="CxHxW", help="shape of an image, e.g. 3x32x32")
    parser.add_argument("--num-classes", "--num_classes", type=int, default=10)
    parser.add_argument("--sparsity", type=float, default=0.9, help="for the preview of the distributions")
    parser.add_argument("--granularity", default="unstructured", help="unstructured, block:64x32, 2:4 or filter")
    parser.add_argument("--batch", type=int, default=128, help="images of one batch, for the times")
    parser.add_argument(
        "--no-measure", "--no_measure", action="store_true", help="leave out the times: seconds to minutes"
    )
    options = parser.parse_args(words)
    from granet.doctor import examine

    batch = None if options.no_measure else options.batch
    found = examine(options.model, options.input, options.num_classes, options.sparsity, options.granularity, batch)
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True)
    for column in ("shape", "weights", "MACs", "kept by ERK", "kept by uniform"):
        table.add_column(column, justify="right", no_wrap=True)
    if batch is not None:
        table.add_column("runs", no_wrap=True)
        for column in ("speed-up", "wins from"):
            table.add_column(column, justify="right", no_wrap=True)
    for layer in found.layers:
        shares = (
            ("does not fit, exclude it: " + layer.problem, "")
            if layer.problem is not None
            else tuple("-" if share is None else f"{share:.2%}" for share in (layer.erk, layer.uniform))
        )
        shape = "x".join(map(str, layer.shape))
        speed = () if batch is None or layer.problem is not None else _speed_cells(layer.speed)
        table.add_row(layer.name, shape, f"{layer.weights:,}", f"{layer.macs:,}", *shares, *speed)
    console = _table_console()
    console.print(table)
    weights = sum(layer.weights for layer in found.layers)
    console.print(
        f"{found.model} on images {'x'.join(map(str, found.image_shape))}: {found.parameters:,} parameters, "
        f"{weights:,} of them in {len(found.layers)} layers that can be sparse; {found.macs:,} MACs an image"
    )
    console.print(
        f"FLOPs at sparsity {options.sparsity:.0%}, dense = 100%: ERK {found.flops_ratio['erk']:.1%}, "
        f"uniform {found.flops_ratio['uniform']:.1%}"
    )
    if found.speedup is not None:
        console.print(
            f"measured on batches of {batch}, forward and backward, against masked dense layers: all of them together "
            f"{found.speedup:.2f}x at sparsity {options.sparsity:.0%} with ERK"
        )
    console.print(_native_text())


def _speed_cells(speed: LayerSpeed | None) -> tuple[str, str, str]:
    """What runs, how much faster than dense it is, the sparsity from which native code wins."""
    if speed is None:
        return "dense, masked gradient", "", ""
    wins = "never" if speed.break_even is None else f"{speed.break_even:.0%}"
    return speed.implementation, f"{speed.speedup:.2f}x", wins


def _native_text() -> str:
    from granet_kernels.cpu_backend import library

    reason = library.unavailable()
    if reason is not None:
        return f"native CPU code: none, {reason}"
    return f"native CPU code: {library.isa()}, threads: {library.threads()}"


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected CHANNELSxHEIGHTxWIDTH such as 3x32x32, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _table_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


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
