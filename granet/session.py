"""Everything that one training run holds in memory: built from a configuration, saved and restored bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import granet_kernels
from granet.checkpoint import CheckpointError
from granet.config import SGD, AdamW, Optimizer, TrainConfig, config_dict
from granet.convert import sparsify
from granet.data import Data, load_data
from granet.evaluate import build_model, pick_device
from granet.flops import layer_macs
from granet.meter import FlopsMeter
from granet.methods import Method
from granet.run import Row
from granet.sparsifier import Sparsifier

FORMAT = 1


@dataclass
class Position:
    """How far the run has come. All of it is saved.

    Attributes:
        epoch: the epoch that is running, from 0.
        batch: batches of that epoch that are done.
        step: optimizer steps done.
        sums: (3,) float64: loss times examples, correct answers, examples; of the epoch so far.
        epoch_seconds: training time of the epoch so far.
        train_seconds: training time of the run, without evaluation and saving.
        seconds: wall-clock time of the run, in all sessions.
        images: images trained on in the run.
        rows: the metrics of the epochs that are done.
        best: the row with the best validation accuracy at the final sparsity, or None.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    epoch_seconds: float = 0.0
    train_seconds: float = 0.0
    seconds: float = 0.0
    images: int = 0
    rows: list[Row] = field(default_factory=list)
    best: Row | None = None


@dataclass
class Session:
    """The live objects of a run.

    Attributes:
        network: what the loop calls: the model, or the model compiled.
        lr_factor: the learning rate at a step, as a factor of the configuration's.
        method: the configuration's, with the run's length filled in.
    """

    config: TrainConfig
    device: torch.device
    data: Data
    model: nn.Module
    network: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    method: Method
    sparsifier: Sparsifier
    meter: FlopsMeter
    lr_factor: Callable[[int], float]
    total_steps: int
    position: Position

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on to the same bits, as plain data and tensors."""
        return {
            "format": FORMAT,
            "config": config_dict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sparsifier": self.sparsifier.state_dict(),
            "meter": self.meter.state_dict(),
            "position": {item.name: getattr(self.position, item.name) for item in dataclasses.fields(Position)},
            "rng": _rng_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was called.

        Raises:
            CheckpointError: the state is of another format, model, optimizer or method.
        """
        if state.get("format") != FORMAT:
            raise CheckpointError(f"expected a checkpoint of format {FORMAT}, got {state.get('format')!r}")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.sparsifier.load_state_dict(state["sparsifier"])
            self.meter.load_state_dict(state["meter"])
            self.position = Position(**state["position"])
            self.position.sums = self.position.sums.to(self.device)
            _set_rng_state(state["rng"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"the checkpoint is not of this run: {reason}") from error

    @property
    def has_final_sparsity(self) -> bool:
        """Whether the method has come to the sparsity at which the run ends."""
        return self.method.sparsity_at(self.sparsifier.step) == self.method.sparsity_at(self.total_steps)

    def weights(self) -> dict[str, Tensor]:
        """The state_dict of the dense model, with zeros where a weight is not kept."""
        return self.sparsifier.dense_state_dict()

    def masks(self) -> dict[str, Tensor]:
        """The mask of each sparse weight, under the weight's name in the state_dict."""
        masks = {id(layer.weight): layer.mask for layer in self.sparsifier.layers}
        return {name: masks[id(p)] for name, p in self.model.named_parameters() if id(p) in masks}


def build_session(config: TrainConfig) -> Session:
    """Load the data and build the model, optimizer and Sparsifier of a run that has not begun.

    Seeds torch's global generator and, unless they are null in the configuration, sets torch's number of threads and
    the plan. All three hold for the whole process, and stay when the run ends.

    Raises:
        ValueError: a value of the configuration does not fit the model, the data or this machine.
        FileNotFoundError: the data are missing.
    """
    device = pick_device(config.device)
    if config.precision == "float16" and device.type != "cuda":
        raise ValueError(f"precision: float16 needs a CUDA device, got {device}; use bfloat16 or float32")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.plan is not None:
        granet_kernels.plan.set_mode(config.plan)
    data = load_data(config.data, config.seed, device)
    batches = data.train.steps_per_epoch(config.batch_size)
    steps_per_epoch = -(-batches // config.accumulate)
    total_steps = config.epochs * steps_per_epoch
    lr_factor = config.lr_schedule.bind(total_steps, steps_per_epoch)
    method = dataclasses.replace(config.method, total_steps=total_steps, steps_per_epoch=steps_per_epoch)

    torch.manual_seed(config.seed)
    model = build_model(config, data, device)
    macs = image_macs(model, config.model, data.image_shape)
    sparsify(model, config.granularity, config.exclude)
    optimizer = build_optimizer(model, config.optimizer)
    sparsifier = Sparsifier(model, optimizer, method, seed=config.seed)
    position = Position()
    position.sums = position.sums.to(device)
    return Session(
        config=config,
        device=device,
        data=data,
        model=model,
        network=torch.compile(model) if config.compile else model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "float16"),
        method=method,
        sparsifier=sparsifier,
        meter=FlopsMeter(macs, sparsifier, method),
        lr_factor=lr_factor,
        total_steps=total_steps,
        position=position,
    )


def image_macs(model: nn.Module, name: str, image_shape: tuple[int, ...]) -> dict[str, int]:
    """layer_macs for one image; the first time that a network meets its images.

    Raises:
        ValueError: it cannot take them.
    """
    try:
        return layer_macs(model, image_shape)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model {name!r} cannot take images of {'x'.join(map(str, image_shape))}: {reason}") from None


def build_optimizer(model: nn.Module, config: Optimizer) -> torch.optim.Optimizer:
    """torch's optimizer of the configuration over parameter_groups(model)."""
    groups = parameter_groups(model, config.weight_decay, config.decay_norm_and_bias)
    if isinstance(config, SGD):
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
    if isinstance(config, AdamW):
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    raise ValueError(f"optimizer: expected SGD or AdamW, got {type(config).__name__}")


def parameter_groups(model: nn.Module, weight_decay: float, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """The trained parameters in two optimizer groups: those that decay, and biases and norm parameters, which do not.

    Args:
        weight_decay: of the first group.
        decay_norm_and_bias: put every parameter in the first group.
    Returns:
        Groups for torch.optim; an empty one is left out.
    """
    decayed: dict[Tensor, None] = {}
    spared: dict[Tensor, None] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in decayed and parameter not in spared:
                spare = not decay_norm_and_bias and (_is_norm(module) or "bias" in name)
                (spared if spare else decayed)[parameter] = None
    groups = [{"params": list(decayed), "weight_decay": weight_decay}, {"params": list(spared), "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
