"""What a finished run has come to: the content of summary.json."""

from __future__ import annotations

import platform
import time
from typing import Any

import torch

import granet_kernels
from granet.checkpoint import NAME as CHECKPOINT
from granet.evaluate import dense_model, loss_and_accuracy
from granet.run import BEST, Row, RunFolder
from granet.session import Session


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
        "unit_sparsity": sparsifier.unit_sparsity,
        "nnz": sparsifier.nnz,
        "numel": sparsifier.numel,
        "exploration": sparsifier.exploration if session.method.records_exploration else None,
        "test_flops_ratio": session.meter.test_ratio,
        "train_flops_ratio": session.meter.train_ratio,
        "images_per_second": at.images / max(at.train_seconds, 1e-9),
        "native_share": at.rows[-1]["native_share"],
        "plan": granet_kernels.plan.mode(),
        "plan_seconds": granet_kernels.plan.summary().seconds,
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
