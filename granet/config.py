"""What one training run is: plain dataclasses, filled by Python code, a YAML recipe or the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from granet import granularity, schedule
from granet.data import DataConfig
from granet.methods import GraNet, Method

Time = int | float | str
PRECISIONS = ("float32", "bfloat16", "float16")
LOGS = ("tensorboard",)
SET_BY_TRAINER = ("total_steps", "steps_per_epoch")


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What every optimizer shares.

    Args:
        lr: the learning rate that the schedule scales.
        weight_decay: of the weights; biases and norm parameters are left out unless decay_norm_and_bias is set.
        decay_norm_and_bias: decay every parameter, as the papers of the Table 7 recipes do.
    """

    lr: float = 0.1
    weight_decay: float = 0.0
    decay_norm_and_bias: bool = False

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optimizer.lr", "a positive number", self.lr)
        _require(self.weight_decay >= 0, "optimizer.weight_decay", "zero or more", self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent.

    Args:
        momentum: 0 <= momentum < 1.
        nesterov: look ahead along the momentum.
    """

    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.momentum < 1, "optimizer.momentum", "0 <= momentum < 1", self.momentum)
        _require(self.momentum > 0 or not self.nesterov, "optimizer.nesterov", "false without momentum", self.nesterov)


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Args:
        betas: decay of the running means of the gradient and of its square.
    """

    lr: float = 0.001
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", "two numbers in [0, 1)", self.betas)


@dataclass(frozen=True, kw_only=True)
class LrSchedule:
    """The learning rate's course over the run, as a factor of optimizer.lr.

    Args:
        warmup: linear warm-up from 0; a time: steps (100), a part of the run (0.05, "5%") or "5 epochs".
    """

    warmup: Time = 0

    def bind(self, total_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
        """The factor as a function of the step, 0 <= step < total_steps, with all times resolved to steps."""
        warmup_steps = schedule.resolve_time(self.warmup, total_steps, steps_per_epoch, "lr_schedule.warmup")
        decay = self._bind_decay(total_steps, steps_per_epoch, warmup_steps)
        return lambda step: schedule.warmup(step, warmup_steps) * decay(step)

    def _bind_decay(self, total_steps: int, steps_per_epoch: int, warmup_steps: int) -> Callable[[int], float]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Step(LrSchedule):
    """Multiply by gamma at each milestone.

    Args:
        milestones: times, counted from the start of the run.
        gamma: the factor of one milestone.
    """

    milestones: list[Time] = field(default_factory=lambda: [0.5, 0.75])
    gamma: float = 0.1

    def _bind_decay(self, total_steps: int, steps_per_epoch: int, warmup_steps: int) -> Callable[[int], float]:
        steps = [
            schedule.resolve_time(time, total_steps, steps_per_epoch, "lr_schedule.milestones")
            for time in self.milestones
        ]
        return lambda step: schedule.step_decay(step, steps, self.gamma)


@dataclass(frozen=True, kw_only=True)
class Cosine(LrSchedule):
    """Half a cosine from 1, after the warm-up, to final at the end of the run.

    Args:
        final: the last factor.
    """

    final: float = 0.0

    def _bind_decay(self, total_steps: int, steps_per_epoch: int, warmup_steps: int) -> Callable[[int], float]:
        length = max(total_steps - warmup_steps, 1)
        return lambda step: schedule.cosine_decay(max(step - warmup_steps, 0), length, self.final)


@dataclass(frozen=True, kw_only=True)
class Linear(LrSchedule):
    """A straight line from 1, after the warm-up, to final at the end of the run.

    Args:
        final: the last factor.
    """

    final: float = 0.0

    def _bind_decay(self, total_steps: int, steps_per_epoch: int, warmup_steps: int) -> Callable[[int], float]:
        length = max(total_steps - warmup_steps, 1)
        return lambda step: schedule.linear_decay(max(step - warmup_steps, 0), length, self.final)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Args:
        model: a name of granet.models.model_names().
        data: which examples.
        method: what sparsifies, e.g. GraNet.
        optimizer: SGD or AdamW.
        lr_schedule: Step, Cosine or Linear.
        epochs: passes over the training examples.
        batch_size: examples of one forward pass.
        accumulate: forward passes of one optimizer step.
        label_smoothing: 0 <= label_smoothing < 1.
        clip_grad_norm: largest gradient norm; null does not clip. In the one step before a mask update
            the norm is that of the dense gradient.
        precision: float32, or autocast to bfloat16 or float16 (CUDA, with loss scaling).
        channels_last: keep images and convolutions in channels-last order.
        compile: torch.compile the network.
        granularity: unstructured, block:64x32, 2:4 or filter.
        exclude: layers that stay dense, by name or glob.
        seed: of the initial weights, masks, batches and augmentation.
        device: auto, cpu, cuda or cuda:1; auto is cuda where there is one.
        threads: CPU threads of torch; null leaves torch's choice.
        plan: what computes sparse layers on a CPU: rule (native code up to half the weights of a convolution and three
            tenths of a linear layer's, dense above), measured (the fastest, as found out in the run), native, dense, or
            a file of granet_kernels.plan.save; null leaves it to GRANET_PLAN, else measured. A measured plan is faster
            at densities near the break-even, but two runs differ in the last bits; with any other they are the same,
            as is a run resumed.
        checkpoint_every: optimizer steps between checkpoints within an epoch; 0 saves at the end of epochs only.
        log: additional logs, of: tensorboard.
    """

    model: str = "digits-cnn"
    data: DataConfig = field(default_factory=DataConfig)
    method: Method = field(default_factory=GraNet)
    optimizer: Optimizer = field(default_factory=SGD)
    lr_schedule: LrSchedule = field(default_factory=Step)
    epochs: int = 1
    batch_size: int = 128
    accumulate: int = 1
    label_smoothing: float = 0.0
    clip_grad_norm: float | None = None
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    granularity: str = "unstructured"
    exclude: list[str] = field(default_factory=list)
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    plan: str | None = "rule"
    checkpoint_every: int = 0
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("checkpoint_every", "seed"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(self.threads is None or self.threads >= 1, "threads", "1 or more", self.threads)
        _require(0 <= self.label_smoothing < 1, "label_smoothing", "0 <= value < 1", self.label_smoothing)
        clip = self.clip_grad_norm
        _require(clip is None or clip > 0, "clip_grad_norm", "a positive number or null", clip)
        _require(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", self.precision)
        for name in self.log:
            _require(name in LOGS, "log", f"names of {', '.join(LOGS)}", name)
        _require(bool(self.method.name), "method", "one that `granet methods` lists", type(self.method).__name__)
        _require(type(self.optimizer) is not Optimizer, "optimizer", "SGD or AdamW", "Optimizer")
        _require(type(self.lr_schedule) is not LrSchedule, "lr_schedule", "Step, Cosine or Linear", "LrSchedule")
        for name in SET_BY_TRAINER:
            value = getattr(self.method, name, None)
            _require(
                value is None, f"method.{name}", "no value: it follows from epochs, batch_size and the data", value
            )
        granularity.parse(self.granularity)


def config_dict(config: Any) -> dict[str, Any]:
    """A configuration dataclass as nested plain data, in the form that recipes are written in.

    A field that can hold one of several classes becomes {"class_path": "GraNet", "init_args": {...}}.
    """
    values: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Method | Optimizer | LrSchedule):
            value = {"class_path": type(value).__name__, "init_args": config_dict(value)}
        elif dataclasses.is_dataclass(value):
            value = config_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Path):
            value = str(value)
        if item.name not in SET_BY_TRAINER:
            values[item.name] = value
    return values


def config_yaml(config: TrainConfig) -> str:
    """The configuration as YAML that `granet train --config FILE` reads back to an equal one."""
    return yaml.safe_dump(config_dict(config), sort_keys=False)


def differences(saved: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    """The fields in which two config_dict results differ, each as `name: saved -> given`.

    Of two different classes only the names are compared: their other fields have nothing in common.
    """
    found = []
    keys = saved.keys() | given.keys()
    if saved.get("class_path") != given.get("class_path"):
        keys = {"class_path"}
    for key in sorted(keys):
        name = f"{prefix}{key}".replace(".init_args", "").removesuffix(".class_path")
        old, new = saved.get(key), given.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{name}: {old!r} -> {new!r}")
    return found
