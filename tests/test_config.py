import pytest
from training_support import small_config

from granet.config import SGD, AdamW, Cosine, Linear, LrSchedule, Optimizer, Step, TrainConfig, config_dict, differences
from granet.methods import GraNet, RigL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs: expected 1 or more, got 0"),
        ({"batch_size": -1}, "batch_size: expected 1 or more, got -1"),
        ({"accumulate": 0}, "accumulate: expected 1 or more, got 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"threads": 0}, "threads: expected 1 or more, got 0"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 <= value < 1, got 1.0"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm: expected a positive number or null, got 0.0"),
        ({"precision": "int8"}, "precision: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"log": ["wandb"]}, "log: expected names of tensorboard, got 'wandb'"),
        ({"granularity": "3:2"}, "3:2"),
        ({"method": GraNet(total_steps=5)}, "method.total_steps: expected no value"),
        ({"optimizer": Optimizer()}, "optimizer: expected SGD or AdamW, got 'Optimizer'"),
        ({"lr_schedule": LrSchedule()}, "lr_schedule: expected Step, Cosine or Linear, got 'LrSchedule'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_value_out_of_range_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(lr=0.0), "optimizer.lr"),
        (lambda: SGD(weight_decay=-1.0), "optimizer.weight_decay"),
        (lambda: SGD(momentum=1.0), "optimizer.momentum"),
        (lambda: SGD(momentum=0.0, nesterov=True), "optimizer.nesterov"),
        (lambda: AdamW(betas=(0.9, 1.0)), "optimizer.betas"),
    ],
)
def test_optimizer_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_config_dict_names_the_chosen_classes():
    values = config_dict(small_config())
    assert values["method"]["class_path"] == "GraNet"
    assert values["method"]["init_args"]["sparsity"] == 0.8
    assert "total_steps" not in values["method"]["init_args"]
    assert values["data"]["name"] == "digits"


def test_differences_name_each_field():
    saved = config_dict(small_config())
    given = config_dict(small_config(epochs=3, method=RigL(sparsity=0.9)))
    found = differences(saved, given)
    assert "epochs: 2 -> 3" in found
    assert "method: 'GraNet' -> 'RigL'" in found
    assert differences(saved, saved) == []


def test_step_schedule_counts_milestones_from_the_start():
    factor = Step(milestones=["50%", "3 epochs"], gamma=0.1).bind(total_steps=40, steps_per_epoch=10)
    assert [factor(step) for step in (0, 19, 20, 29, 30, 39)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    "schedule", [Cosine(warmup=4, final=0.2), Linear(warmup=4, final=0.2)], ids=["cosine", "linear"]
)
def test_decay_begins_after_the_warmup(schedule):
    factor = schedule.bind(total_steps=24, steps_per_epoch=4)
    assert factor(0) == pytest.approx(0.2)
    assert factor(4) == pytest.approx(1.0)
    assert factor(14) == pytest.approx(0.6)
    assert factor(23) > 0.2
    assert factor(24) == pytest.approx(0.2)


def test_time_outside_the_run_is_named():
    with pytest.raises(ValueError, match=r"lr_schedule\.warmup.*within the run of 10 steps"):
        Cosine(warmup=11).bind(total_steps=10, steps_per_epoch=5)
