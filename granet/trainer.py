"""The training loop: from a configuration to a run folder with a trained sparse network."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from granet import plots
from granet.checkpoint import NAME as CHECKPOINT
from granet.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from granet.config import TrainConfig
from granet.evaluate import arrange, autocast, dense_model, loss_and_accuracy
from granet.interrupt import Interrupted, StopRequest
from granet.progress import Silent
from granet.run import BEST, LAST, Row, RunFolder, check_resumable
from granet.session import Session, build_session
from granet.tensorboard import row_writer


def train(config: TrainConfig, run_dir: Path, resume: bool = False, report: Silent | None = None) -> Row:
    """Train one network and leave everything about it in `run_dir`.

    A resumed run ends bit for bit where it would have ended had it not stopped.

    Args:
        config: what to train.
        run_dir: a folder without a run, made where it does not exist; with resume, the run's folder.
        resume: go on from the folder's newest checkpoint, or from the beginning where there is none yet.
        report: shows the progress; nothing is shown by default.
    Returns:
        The content of summary.json.
    Raises:
        ValueError: the configuration does not fit; the checkpoint is damaged or of another run; the loss is not finite.
        OSError: data or run folder are missing, the folder is taken, or the disk is full.
        Interrupted: SIGINT or SIGTERM came; the run is saved.
    """
    began = time.monotonic()
    folder, report = RunFolder(run_dir), report or Silent()
    folder.check(config, resume)
    finished = folder.load_summary()
    if finished is not None:
        report.say(f"{folder.path} has finished already")
        return finished
    session = build_session(config)
    log = row_writer(config.log, folder.path)
    if resume:
        restore(session, folder, report)
    else:
        folder.create(config)
        report.say(f"run folder: {folder.path}")
    began -= session.position.seconds

    at, data, optimizer, scaler = session.position, session.data, session.optimizer, session.scaler
    with report, StopRequest() as stop:
        report.start(at.step, session.total_steps, config.epochs)
        while at.epoch < config.epochs:
            session.model.train()
            clock = Clock(session.device)
            batches = data.train.batches(config.batch_size, at.epoch, start=at.batch)
            for group in grouped(batches, config.accumulate):
                set_learning_rate(session)
                optimizer.zero_grad()
                for images, labels in group:
                    with autocast(config, session.device):
                        outputs = session.network(arrange(images, config))
                        loss = F.cross_entropy(outputs, labels, label_smoothing=config.label_smoothing)
                    scaler.scale(loss / len(group)).backward()
                    add_sums(at.sums, loss.detach(), outputs.detach(), labels)
                    at.images += len(labels)
                if config.clip_grad_norm is not None:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(session.model.parameters(), config.clip_grad_norm)
                session.meter.before_step()
                scaler.step(optimizer)
                scaler.update()
                at.step += 1
                at.batch += len(group)
                report.step(at.epoch, at.step, images_per_second(session, clock), session.sparsifier.sparsity)
                if stop.signum is not None or (config.checkpoint_every and at.step % config.checkpoint_every == 0):
                    clock.add_to(session)
                    save(session, folder, began)
                    if stop.signum is not None:
                        raise Interrupted(stop.signum, folder.path)
                    clock = Clock(session.device)
            clock.add_to(session)
            finish_epoch(session, folder, began)
            report.epoch(at.rows[-1])
            log(at.rows[-1])
            if stop.signum is not None and at.epoch < config.epochs:
                raise Interrupted(stop.signum, folder.path)
    return finish(session, folder, began)


class Clock:
    """Measures a stretch of training, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the clock was made; work that the device has yet to do is not in it."""
        return time.monotonic() - self.began

    def add_to(self, session: Session) -> None:
        """Wait for the device and add the stretch to the session's training time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = self.seconds
        session.position.epoch_seconds += seconds
        session.position.train_seconds += seconds


def grouped(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches in lists of `size`, one optimizer step each; the last list may be shorter."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def set_learning_rate(session: Session) -> None:
    """Give the optimizer the learning rate of the step that comes next."""
    lr = session.config.optimizer.lr * session.lr_factor(session.position.step)
    for group in session.optimizer.param_groups:
        group["lr"] = lr


def add_sums(sums: Tensor, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
    """Add a batch to the epoch's (3,) sums of loss, correct answers and examples, without waiting for the device."""
    sums[0] += loss.double() * len(labels)
    sums[1] += (outputs.argmax(1) == labels).sum()
    sums[2] += len(labels)


def images_per_second(session: Session, clock: Clock) -> float:
    """Training speed of the run so far."""
    return session.position.images / max(session.position.train_seconds + clock.seconds, 1e-9)


def restore(session: Session, folder: RunFolder, report: Silent) -> None:
    """Bring the session to where the folder's newest checkpoint was written."""
    path = find_checkpoint(folder.path)
    if path is None:
        report.say(f"{folder.path} holds no checkpoint yet: starting from the beginning")
        return
    state = load_checkpoint(path)
    check_resumable(state.get("config", {}), session.config, path)
    session.load_state_dict(state)
    folder.write_metrics(session.position.rows)
    report.say(f"resuming {path} after step {session.position.step} of {session.total_steps}")


def save(session: Session, folder: RunFolder, began: float) -> None:
    """Write a checkpoint."""
    session.position.seconds = time.monotonic() - began
    save_checkpoint(folder.path, session.state_dict())


def finish_epoch(session: Session, folder: RunFolder, began: float) -> None:
    """Evaluate, note the epoch's row, keep the best weights, save, and move on to the next epoch."""
    at = session.position
    loss, correct, examples = at.sums.tolist()
    if not math.isfinite(loss):
        raise ValueError(
            f"the training loss became {loss / examples} in epoch {at.epoch + 1}; "
            "lower optimizer.lr, lengthen lr_schedule.warmup or set clip_grad_norm"
        )
    validation: tuple[float | None, float | None] = (None, None)
    if session.data.validation is not None:
        session.model.eval()
        validation = loss_and_accuracy(session.network, session.data.validation, session.config)
    row = {
        "epoch": at.epoch + 1,
        "step": at.step,
        "train_loss": loss / examples,
        "train_accuracy": correct / examples,
        "validation_loss": validation[0],
        "validation_accuracy": validation[1],
        "lr": session.optimizer.param_groups[0]["lr"],
        "sparsity": session.sparsifier.sparsity,
        "nnz": session.sparsifier.nnz,
        "test_flops_ratio": session.meter.test_ratio,
        "train_flops_ratio": session.meter.train_ratio,
        "images_per_second": examples / max(at.epoch_seconds, 1e-9),
        "seconds": time.monotonic() - began,
    }
    at.rows.append(row)
    if is_best(session, row):
        at.best = row
        write_weights(session, folder, BEST)
    at.epoch, at.batch, at.epoch_seconds = at.epoch + 1, 0, 0.0
    at.sums.zero_()
    save(session, folder, began)
    folder.write_metrics(at.rows)


def is_best(session: Session, row: Row) -> bool:
    """Whether the row's weights have the final sparsity and the best validation accuracy with it so far."""
    if row["validation_accuracy"] is None or not session.has_final_sparsity:
        return False
    best = session.position.best
    return best is None or row["validation_accuracy"] > best["validation_accuracy"]


def write_weights(session: Session, folder: RunFolder, name: str) -> None:
    """Write the dense model's weights and the masks."""
    folder.write_weights(f"{name}.safetensors", session.weights(), {"model": session.config.model})
    folder.write_masks(f"{name}-masks.safetensors", session.masks())


def finish(session: Session, folder: RunFolder, began: float) -> Row:
    """Look at the test set, once, and write the weights, table, plots and summary."""
    write_weights(session, folder, LAST)
    folder.write_layers(session.sparsifier.table())
    plots.plot_run(folder)
    summary = summarise(session, folder, began)
    folder.write_summary(summary)
    return summary


def summarise(session: Session, folder: RunFolder, began: float) -> Row:
    """The content of summary.json."""
    at, config, sparsifier = session.position, session.config, session.sparsifier
    session.model.eval()
    test_loss, test_accuracy = loss_and_accuracy(session.network, session.data.test, config)
    return {
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        **best_results(session, folder, test_accuracy),
        "sparsity": sparsifier.sparsity,
        "nnz": sparsifier.nnz,
        "numel": sparsifier.numel,
        "exploration": sparsifier.exploration if session.method.records_exploration else None,
        "test_flops_ratio": session.meter.test_ratio,
        "train_flops_ratio": session.meter.train_ratio,
        "images_per_second": at.images / max(at.train_seconds, 1e-9),
        "seconds": time.monotonic() - began,
        "checkpoint_bytes": (folder.path / CHECKPOINT).stat().st_size,
        "epochs": config.epochs,
        "steps": at.step,
        "model": config.model,
        "data": config.data.name,
        "method": type(config.method).__name__,
        "seed": config.seed,
        "device": device_name(session.device),
        "torch": torch.__version__,
        "last": at.rows[-1],
    }


def best_results(session: Session, folder: RunFolder, last_test_accuracy: float) -> dict[str, Any]:
    """Epoch, validation and test accuracy of the weights that validation prefers; without validation, all None."""
    best = session.position.best
    if best is None:
        return {"best_epoch": None, "best_validation_accuracy": None, "best_test_accuracy": None}
    accuracy = last_test_accuracy
    if best["epoch"] < session.config.epochs:
        state = folder.load_weights(f"{BEST}.safetensors")
        model = dense_model(session.config, session.data, state, session.device)
        _, accuracy = loss_and_accuracy(model, session.data.test, session.config)
    return {
        "best_epoch": best["epoch"],
        "best_validation_accuracy": best["validation_accuracy"],
        "best_test_accuracy": accuracy,
    }


def device_name(device: torch.device) -> str:
    """The hardware that trained, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
