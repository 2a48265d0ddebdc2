"""The recipes against Table 7 of arXiv:2106.10404."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest

from granet.config import SGD, Step, TrainConfig, config_dict
from granet.methods import GraNet
from granet.models import model_names
from granet.names import UsageError
from granet.options import parse_config
from granet.recipes import DEFAULT, recipe_names, recipe_path, recipe_title
from granet.schedule import resolve_time

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
TASKS = [
    *product(("vgg19", "resnet50"), ("cifar10", "cifar100")),
    ("resnet50", "imagenet"),
    ("resnet20", "cifar10"),
    ("resnet56", "cifar10"),
]
ROWS = {
    f"{model}-{data}-granet-{start}-to-{end}": (model, data, float(start), end)
    for (model, data), start, end in product(TASKS, ("0", "0.5"), SPARSITIES)
}
CIFAR_STEPS, IMAGENET_STEPS = 160 * 391, 100 * 20019


def load(name: str) -> TrainConfig:
    root = [] if name == DEFAULT else ["--data.root", "data"]
    return parse_config(root, recipe_path(name))


def test_every_row_has_its_recipe():
    assert set(recipe_names()) == {*ROWS, DEFAULT}


@pytest.mark.parametrize("name", ROWS)
def test_recipe_is_its_row(name):
    model, data, start, end = ROWS[name]
    config = load(name)
    assert config.model == ("resnet50-cifar" if model == "resnet50" and data != "imagenet" else model)
    assert config.model in model_names()
    assert config.data.name == data
    assert isinstance(config.method, GraNet)
    assert (config.method.initial_sparsity, config.method.sparsity) == (start, end)
    assert f"{start:.0%} to {end:.0%}" in recipe_title(name)


@pytest.mark.parametrize("name", ROWS)
def test_times_are_the_papers(name):
    _, data, start, _ = ROWS[name]
    config = load(name)
    imagenet = data == "imagenet"
    steps, interval, epochs = (IMAGENET_STEPS, 4000, 100) if imagenet else (CIFAR_STEPS, 1000, 160)
    prune_epoch = 30 if imagenet else (110 if start == 0 else 80)
    assert isinstance(config.method, GraNet)
    assert isinstance(config.lr_schedule, Step)
    assert config.epochs == epochs
    assert resolve_time(config.method.update_every, steps) == pytest.approx(interval, rel=2e-3)
    assert resolve_time(config.method.prune_until, steps) == prune_epoch * steps // epochs
    milestones = [resolve_time(time, steps) * epochs // steps for time in config.lr_schedule.milestones]
    assert milestones == ([30, 60, 90] if imagenet else [80, 120])
    assert (config.method.regrow_ratio, config.method.final_regrow_ratio) == (0.5, 0.005)


@pytest.mark.parametrize("task", TASKS, ids="-".join)
def test_rows_of_a_task_differ_in_sparsity_alone(task):
    configs = [load(name) for name, row in ROWS.items() if row[:2] == task]
    plain = GraNet()
    assert len({str(config_dict(dataclasses.replace(config, method=plain))) for config in configs}) == 1
    optimizer = configs[0].optimizer
    assert isinstance(optimizer, SGD)
    assert (optimizer.lr, optimizer.momentum) == (0.1, 0.9)
    assert optimizer.weight_decay == (1e-4 if task[1] == "imagenet" else 5e-4)
    assert configs[0].batch_size == (64 if task[1] == "imagenet" else 128)


def test_default_needs_no_data():
    assert load(DEFAULT).data.name == "digits"


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"did you mean vgg19-cifar10-granet-0\.5-to-0\.9\?"):
        recipe_path("vgg19-cifar10-granet-0.5-to-0.91")
