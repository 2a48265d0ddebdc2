"""What a run shows while it trains: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Silent:
    """Shows nothing. The other reporters override what they show."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, step: int, total_steps: int, epochs: int) -> None:
        """The loop begins, or goes on, at `step`."""

    def step(self, epoch: int, step: int, images_per_second: float, sparsity: float) -> None:
        """An optimizer step is done."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch is done; `row` is its row of the metrics."""

    def say(self, text: str) -> None:
        """One line of text."""


class Lines(Silent):
    """One line an epoch."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.epochs = 0

    def start(self, step: int, total_steps: int, epochs: int) -> None:
        self.epochs = epochs

    def epoch(self, row: dict[str, Any]) -> None:
        self.say(epoch_line(row, self.epochs))

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Bar(Lines):
    """A live bar with images/s, sparsity and time to go, above it one line an epoch."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}% · {task.fields[rate]} images/s · sparsity {task.fields[sparsity]} ·"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("epoch 1", total=None, rate="-", sparsity="-")
        self.shown = 0.0

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def start(self, step: int, total_steps: int, epochs: int) -> None:
        super().start(step, total_steps, epochs)
        self.progress.update(self.task, total=total_steps, completed=step)

    def step(self, epoch: int, step: int, images_per_second: float, sparsity: float) -> None:
        now = time.monotonic()
        if now - self.shown < 0.1:
            return
        self.shown = now
        self.progress.update(
            self.task,
            completed=step,
            description=f"epoch {epoch + 1}/{self.epochs}",
            rate=f"{images_per_second:,.0f}",
            sparsity=f"{sparsity:.2%}",
        )


def reporter(console: Console) -> Silent:
    """The live bar where `console` is a terminal, else plain lines."""
    return Bar(console) if console.is_terminal else Lines(console)


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One row of the metrics as a line of text."""
    parts = [
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}",
        f"loss {row['train_loss']:.4f}",
        f"train {row['train_accuracy']:.2%}",
    ]
    if row["validation_accuracy"] is not None:
        parts.append(f"validation {row['validation_accuracy']:.2%}")
    parts += [
        f"sparsity {row['sparsity']:.2%}",
        f"lr {row['lr']:.3g}",
        f"{row['images_per_second']:,.0f} images/s",
    ]
    return "  ".join(parts)
