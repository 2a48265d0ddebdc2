"""The training loop: from a configuration to a run folder with a trained sparse network."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from granet import plots
from granet.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from granet.config import TrainConfig
from granet.evaluate import arrange, autocast, loss_and_accuracy
from granet.interrupt import Interrupted, StopRequest
from granet.progress import Silent
from granet.run import BEST, LAST, Row, RunFolder, check_resumable, new_run_folder
from granet.session import Session, build_session
from granet.summary import summarise
from granet.tensorboard import row_writer


def train(config: TrainConfig, run_dir: Path | None = None, resume: bool = False, report: Silent | None = None) -> Row:
    """Train one network and leave everything about it in a run folder.

    A resumed run ends bit for bit where it would have ended had it not stopped, on the same machine and as far as the
    device's own operations are deterministic (a CPU's are).

    Args:
        config: what to train.
        run_dir: a folder without a run, made where it does not exist; with resume, the run's folder. None makes a new
            folder under runs/.
        resume: go on from the folder's newest checkpoint, or from the beginning where there is none yet.
        report: shows the progress; nothing is shown by default.
    Returns:
        The content of summary.json.
    Raises:
        ValueError: the configuration does not fit; the checkpoint is damaged or of another run; the loss or a weight is
            not finite.
        OSError: data or run folder are missing, the folder is taken or in use, or the disk is full.
        Interrupted: SIGINT or SIGTERM came; the run is saved.
    """
    began = time.monotonic()
    report = report or Silent()
    folder = None if run_dir is None else RunFolder(run_dir)
    if folder is not None:
        folder.check(config, resume)
        finished = folder.load_summary()
        if finished is not None:
            report.say(f"{folder.path} has finished already")
            return finished
    with StopRequest() as stop:
        session = build_session(config)
        folder = new_run_folder(config) if folder is None else folder
        with folder.held():
            folder.check(config, resume)
            if resume:
                restore(session, folder, report)
            else:
                folder.create(config)
                report.say(f"run folder: {folder.path}")
            try:
                return run(session, folder, report, stop, began - session.position.seconds)
            except KeyboardInterrupt:
                raise Interrupted(signal.SIGINT, folder.path, saved=False) from None


def run(session: Session, folder: RunFolder, report: Silent, stop: StopRequest, began: float) -> Row:
    """The training loop: from the session's position to the end of the run."""
    at, config, data = session.position, session.config, session.data
    optimizer, scaler = session.optimizer, session.scaler
    log = row_writer(config.log, folder.path)
    with report:
        report.start(at.step, session.total_steps, config.epochs)
        while at.epoch < config.epochs:
            session.model.train()
            clock = Clock(session.device)
            batches = data.train.batches(config.batch_size, at.epoch, start=at.batch)
            for group in grouped(batches, config.accumulate):
                set_learning_rate(session)
                optimizer.zero_grad()
                examples = sum(len(labels) for _, labels in group)
                for images, labels in group:
                    with autocast(config, session.device):
                        outputs = session.network(arrange(images, config))
                        loss = F.cross_entropy(outputs, labels, label_smoothing=config.label_smoothing)
                    scaler.scale(loss * (len(labels) / examples)).backward()
                    add_sums(at.sums, loss.detach(), outputs.detach(), labels)
                if config.clip_grad_norm is not None:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(session.model.parameters(), config.clip_grad_norm)
                session.meter.before_step()
                scaler.step(optimizer)
                scaler.update()
                at.step += 1
                at.batch += len(group)
                at.images += examples
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
        return finish(session, folder, report, began)


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
    """Write a checkpoint, unless the run has come to nothing: the good ones must not be replaced by that."""
    check_finite(session)
    session.position.seconds = time.monotonic() - began
    save_checkpoint(folder.path, session.state_dict())


def check_finite(session: Session) -> None:
    """Raise ValueError if the training loss or a weight is NaN or infinite."""
    loss = session.position.sums[0].item()
    finite = torch.stack([torch.isfinite(parameter).all() for parameter in session.model.parameters()])
    if not math.isfinite(loss) or not bool(finite.all()):
        what = "training loss" if not math.isfinite(loss) else "network has a weight that"
        raise ValueError(
            f"the {what} is not finite in epoch {session.position.epoch + 1}, step {session.position.step}; "
            "lower optimizer.lr, lengthen lr_schedule.warmup or set clip_grad_norm"
        )


def finish_epoch(session: Session, folder: RunFolder, began: float) -> None:
    """Evaluate, note the epoch's row, keep the best weights, save, and move on to the next epoch."""
    at = session.position
    check_finite(session)
    loss, correct, examples = at.sums.tolist()
    # Before validation, whose batches may run otherwise. A run resumed at an epoch's very end has computed nothing yet.
    native_share = session.sparsifier.native_share
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
        "native_share": native_share,
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


def finish(session: Session, folder: RunFolder, report: Silent, began: float) -> Row:
    """Look at the test set, once, and write the weights, table, plots and summary."""
    if not session.has_final_sparsity:
        report.say(
            f"loss scaling skipped {session.total_steps - session.sparsifier.step} of {session.total_steps} steps, and"
            f" with them the last updates: the sparsity is {session.sparsifier.sparsity:.4%}. Let the method end"
            " earlier (method.prune_until) or train longer"
        )
    write_weights(session, folder, LAST)
    folder.write_layers(session.sparsifier.table())
    plots.plot_run(folder)
    summary = summarise(session, folder, began)
    folder.write_summary(summary)
    return summary
