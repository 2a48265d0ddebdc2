"""Compare finished runs of `granet train`: images/s and the share of native products over the epochs, and the end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import plots
from bench.records import RESULTS, Row, markdown


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__, allow_abbrev=False)
    options.add_argument("runs", nargs="+", type=finished, metavar="RUN", help="run folders; their names are shown")
    options.add_argument("--png", type=Path, default=RESULTS / "training.png", metavar="FILE", help="the picture")
    args = options.parse_args(argv)
    epochs = {path.name: [json.loads(line) for line in _text(path, "metrics.jsonl").splitlines()] for path in args.runs}
    summaries = {path.name: json.loads(_text(path, "summary.json")) for path in args.runs}
    print(table(epochs, summaries))
    args.png.parent.mkdir(parents=True, exist_ok=True)
    plots.save_training(epochs, args.png, _title(summaries))
    return 0


def finished(text: str) -> Path:
    """The folder of a finished run."""
    if not Path(text, "summary.json").is_file():
        raise argparse.ArgumentTypeError(f"expected the folder of a finished run, with its summary.json, got {text!r}")
    return Path(text)


def table(epochs: dict[str, list[Row]], summaries: dict[str, Row]) -> str:
    """Markdown: one line a run."""
    header = ["run", "plan", "test accuracy", "sparsity", "native", "images/s, first epoch", "last", "training, s"]
    lines = [
        [
            name,
            summary["plan"],
            f"{summary['test_accuracy']:.2%}",
            f"{summary['sparsity']:.2%}",
            "n/a" if summary["native_share"] is None else f"{summary['native_share']:.0%}",
            f"{epochs[name][0]['images_per_second']:.0f}",
            f"{epochs[name][-1]['images_per_second']:.0f}",
            f"{summary['seconds']:.0f}",
        ]
        for name, summary in summaries.items()
    ]
    return markdown(header, lines)


def _title(summaries: dict[str, Row]) -> str:
    first = next(iter(summaries.values()))
    return f"{first['model']}, {first['data']}, {first['method']} to {first['unit_sparsity']:.0%}"


def _text(path: Path, name: str) -> str:
    return (path / name).read_text()


if __name__ == "__main__":
    sys.exit(main())
