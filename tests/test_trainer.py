"""The training loop in this process: what a run leaves behind, and that a stopped run ends as an unstopped one."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch
from torch import nn
from training_support import assert_same_end, metrics, small_config

from granet import run as run_module
from granet import trainer as trainer_module
from granet.checkpoint import NAME, PREVIOUS_NAME, CheckpointError, load_checkpoint
from granet.config import SGD, AdamW, Linear, Step
from granet.data import DataConfig
from granet.interrupt import Interrupted
from granet.methods import GMP, ITOP, SET, GraNet, RigL, Static
from granet.models import create_model
from granet.options import parse_config
from granet.progress import Silent
from granet.run import COLUMNS, RunFolder
from granet.trainer import train


class StopAt(Silent):
    """Raises after an optimizer step, as if the process had ended there."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, epoch: int, step: int, images_per_second: float, sparsity: float) -> None:
        if step == self.at:
            raise SystemError("power cut")


class SignalAt(StopAt):
    def step(self, epoch: int, step: int, images_per_second: float, sparsity: float) -> None:
        if step == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, train(small_config(), folder)


def test_summary_has_every_figure(finished):
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["nnz"] == round(0.2 * summary["numel"])
    assert summary["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert 0.5 < summary["test_accuracy"] <= 1
    assert 0 < summary["test_flops_ratio"] < 0.5
    assert summary["test_flops_ratio"] < summary["train_flops_ratio"] < 1
    assert summary["checkpoint_bytes"] == (folder / NAME).stat().st_size
    assert summary["images_per_second"] > 0
    assert summary["seconds"] > 0
    assert summary["steps"] == 12
    assert summary["last"]["epoch"] == 2


def test_folder_holds_everything(finished):
    folder, _ = finished
    names = {
        "config.yaml", "metrics.jsonl", "metrics.csv", "summary.json", "layers.csv", NAME, PREVIOUS_NAME,
        "model.safetensors", "model-masks.safetensors", "best.safetensors", "best-masks.safetensors",
        "learning.png", "sparsity.png", "speed.png", "layers.png",
    }  # fmt: skip
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "learning.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_files_agree(finished):
    folder, _ = finished
    rows = RunFolder(folder).load_metrics()
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2"]
    assert [row["step"] for row in rows] == [6, 12]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert rows[1]["seconds"] > rows[0]["seconds"]


def test_weights_load_into_the_dense_model(finished):
    folder, summary = finished
    state = RunFolder(folder).load_weights("model.safetensors")
    masks = RunFolder(folder).load_masks("model-masks.safetensors")
    create_model("mlp", num_classes=10, in_channels=1, image_size=8).load_state_dict(state)
    assert sum(int(mask.sum()) for mask in masks.values()) == summary["nnz"]
    assert all(bool((state[name][~mask] == 0).all()) for name, mask in masks.items())


def test_best_is_sought_at_the_final_sparsity_only(finished):
    _, summary = finished
    assert summary["best_epoch"] in (1, 2)
    rows = [summary["last"]]
    assert summary["best_validation_accuracy"] >= rows[0]["validation_accuracy"]


@pytest.mark.filterwarnings("ignore:layer .* (has lost all its units|starts without a unit)")
def test_best_ignores_denser_epochs(tmp_path):
    method = GraNet(initial_sparsity=0.0, sparsity=0.98, update_every=2, prune_until=1.0)
    assert train(small_config(method=method), tmp_path / "run")["best_epoch"] == 2


def test_same_seed_same_run(finished, tmp_path):
    train(small_config(), tmp_path / "again")
    assert_same_end(finished[0], tmp_path / "again")


def test_other_seed_other_run(finished, tmp_path):
    train(small_config(seed=1), tmp_path / "other")
    assert metrics(finished[0]) != metrics(tmp_path / "other")


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 7, 11, 12])
def test_resumed_run_ends_as_the_unstopped_one(finished, tmp_path, stop):
    config = small_config(checkpoint_every=5)
    with pytest.raises(SystemError):
        train(config, tmp_path / "run", report=StopAt(stop))
    train(config, tmp_path / "run", resume=True)
    assert_same_end(finished[0], tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": AdamW(), "lr_schedule": Linear(), "method": RigL(sparsity=0.8, update_every=2)},
        {"accumulate": 4, "batch_size": 64, "clip_grad_norm": 1.0, "method": SET(sparsity=0.8, update_every=2)},
        {"precision": "bfloat16", "label_smoothing": 0.1, "method": ITOP(sparsity=0.8, update_every=2)},
        {"model": "digits-cnn", "channels_last": True, "method": GMP(sparsity=0.8, update_every=2)},
        {"granularity": "filter", "exclude": ["*5"], "lr_schedule": Step(), "method": Static(sparsity=0.5)},
    ],
    ids=["adamw-rigl", "accumulate-clip-set", "bfloat16-smoothing-itop", "channels_last-gmp", "filter-exclude-static"],
)
def test_every_setting_resumes_to_the_bit(tmp_path, changes):
    if "exclude" in changes:
        names = [name for name, module in create_model("mlp").named_modules() if isinstance(module, nn.Linear)]
        changes = {**changes, "exclude": names[-1:]}
    config = small_config(checkpoint_every=3, epochs=1, **changes)
    train(config, tmp_path / "whole")
    with pytest.raises(SystemError):
        train(config, tmp_path / "stopped", report=StopAt(4))
    train(config, tmp_path / "stopped", resume=True)
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("stop", [1, 6, 11])
def test_signal_saves_and_resumes(finished, tmp_path, stop):
    with pytest.raises(Interrupted) as caught:
        train(small_config(), tmp_path / "run", report=SignalAt(stop))
    assert caught.value.signum == signal.SIGTERM
    assert load_checkpoint(tmp_path / "run" / NAME)["position"]["step"] == stop
    train(small_config(), tmp_path / "run", resume=True)
    assert_same_end(finished[0], tmp_path / "run")


def test_finished_run_is_not_run_again(finished):
    folder, summary = finished
    before = (folder / NAME).stat().st_mtime_ns
    assert train(small_config(), folder, resume=True) == summary
    assert (folder / NAME).stat().st_mtime_ns == before


def test_folder_with_a_run_is_refused(finished):
    with pytest.raises(FileExistsError, match="already holds a run; add --resume"):
        train(small_config(), finished[0])


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run in"):
        train(small_config(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"epochs": 3}, "epochs: 2 -> 3"),
        ({"model": "digits-cnn"}, "model: 'mlp' -> 'digits-cnn'"),
        ({"method": GraNet(initial_sparsity=0.2, sparsity=0.9)}, r"method\.sparsity: 0\.8 -> 0\.9"),
        ({"method": RigL(sparsity=0.8)}, "method: 'GraNet' -> 'RigL'"),
        ({"granularity": "filter"}, "granularity: 'unstructured' -> 'filter'"),
        ({"optimizer": AdamW(lr=0.02)}, r"optimizer\.lr: 0\.01 -> 0\.02"),
    ],
    ids=["epochs", "model", "sparsity", "method", "granularity", "lr"],
)
def test_resuming_with_another_configuration_is_refused(finished, changes, difference):
    with pytest.raises(CheckpointError, match=difference):
        train(small_config(**changes), finished[0], resume=True)


def test_damaged_checkpoint_is_refused_and_the_previous_one_resumes(finished, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(SystemError):
        train(small_config(checkpoint_every=2), folder, report=StopAt(5))
    content = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged"):
        train(small_config(checkpoint_every=2), folder, resume=True)
    (folder / NAME).unlink()
    train(small_config(checkpoint_every=2), folder, resume=True)
    assert_same_end(finished[0], folder)


def test_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(SystemError):
        train(small_config(checkpoint_every=2), folder, report=StopAt(5))
    other = tmp_path / "other"
    with pytest.raises(SystemError):
        train(small_config(checkpoint_every=2, model="digits-cnn"), other, report=StopAt(5))
    monkeypatch.setattr(run_module, "differences", lambda saved, given: [])
    (folder / NAME).write_bytes((other / NAME).read_bytes())
    with pytest.raises(CheckpointError, match="the checkpoint is not of this run"):
        train(small_config(checkpoint_every=2), folder, resume=True)


@pytest.mark.parametrize("calls", [1, 2, 3, 6, 9, 13])
def test_full_disk_leaves_what_was_written_whole(finished, tmp_path, monkeypatch, calls):
    folder, left = tmp_path / "run", [calls]

    def fsync(descriptor, real=os.fsync):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        train(small_config(checkpoint_every=2), folder)
    monkeypatch.undo()
    assert not list(folder.glob("*.tmp"))
    train(small_config(checkpoint_every=2), folder, resume=(folder / "config.yaml").exists())
    assert_same_end(finished[0], folder)


def test_infinite_loss_is_an_error(tmp_path):
    config = small_config(optimizer=SGD(lr=1e30), method=Static(sparsity=0.5))
    with pytest.raises(ValueError, match=r"the training loss is not finite in epoch 1, step"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "float16"}, "float16 needs a CUDA device"),
        ({"device": "quantum"}, "device: expected auto, cpu or cuda, got 'quantum'"),
        ({"model": "mlq"}, "unknown model 'mlq'"),
        ({"granularity": "block:7x7"}, "divisible into 7 x 7 blocks"),
        ({"exclude": ["nothing"]}, "nothing"),
        ({"lr_schedule": Step(milestones=["500 epochs"])}, "milestones"),
        ({"data": DataConfig(name="npz", root="/nowhere.npz")}, "nowhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_configuration_that_does_not_fit_makes_no_folder(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(small_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_exploration_is_reported_where_it_is_recorded(finished, tmp_path):
    assert finished[1]["exploration"] is None
    summary = train(small_config(method=ITOP(sparsity=0.8, update_every=2), epochs=1), tmp_path / "run")
    assert 0.2 < summary["exploration"] < 1


def test_without_validation_there_is_no_best(tmp_path):
    summary = train(small_config(data=DataConfig(validation=0), epochs=1), tmp_path / "run")
    assert summary["best_epoch"] is None
    assert summary["last"]["validation_accuracy"] is None
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_accumulation_equals_one_large_batch(tmp_path):
    data = DataConfig(validation=0.109, augment=False)  # 1,280 training images: no smaller last batch
    changes = {"data": data, "epochs": 1, "method": Static(sparsity=0.5)}
    train(small_config(batch_size=256, **changes), tmp_path / "one")
    train(small_config(batch_size=64, accumulate=4, **changes), tmp_path / "four")
    one, four = (RunFolder(tmp_path / name).load_weights("model.safetensors") for name in ("one", "four"))
    weights = [name for name, value in one.items() if value.dim() == 2]
    assert all(torch.allclose(one[name], four[name], atol=1e-4) for name in weights)


def test_checkpoints_are_not_replaced_by_a_network_that_is_not_finite(tmp_path, monkeypatch):
    steps = []

    def poison(session):
        steps.append(1)
        if len(steps) == 5:
            with torch.no_grad():
                next(session.model.parameters()).view(-1)[0] = float("nan")
        real(session)

    real = trainer_module.set_learning_rate
    monkeypatch.setattr(trainer_module, "set_learning_rate", poison)
    with pytest.raises(ValueError, match="not finite in epoch 1, step 5"):
        train(small_config(checkpoint_every=1), tmp_path)
    assert load_checkpoint(tmp_path / NAME)["position"]["step"] == 4
    monkeypatch.undo()
    train(small_config(checkpoint_every=1), tmp_path, resume=True)


def test_a_run_whose_last_updates_were_skipped_says_so(tmp_path, monkeypatch):
    class Overflowing(torch.amp.GradScaler):
        skips = 3

        def step(self, optimizer, *args, **kwargs):
            if self.skips:
                self.skips -= 1
                return None
            return optimizer.step()

        def update(self, new_scale=None):
            pass

    said = []

    class Report(Silent):
        def say(self, text):
            said.append(text)

    real = trainer_module.build_session

    def build(config):
        session = real(config)
        session.scaler = Overflowing("cpu", init_scale=1.0)
        return session

    monkeypatch.setattr(trainer_module, "build_session", build)
    method = GraNet(initial_sparsity=0.2, sparsity=0.8, update_every=2, prune_until=1.0)
    summary = train(small_config(method=method), tmp_path, report=Report())
    assert summary["sparsity"] < 0.8
    assert "loss scaling skipped 3 of 12 steps" in said[-1]


def test_a_relative_root_is_kept_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(["--data.name", "npz", "--data.root", "small.npz"])
    assert config.data.root == str(tmp_path / "small.npz")


def test_a_short_micro_batch_weighs_as_little_as_it_holds(tmp_path):
    # 1298 examples in batches of 256: the last of each epoch holds 18. As one group of 6, or as one batch.
    data = DataConfig(name="digits", validation=0.1, augment=False)
    same = {"epochs": 1, "method": Static(sparsity=0.5), "optimizer": SGD(lr=0.1), "data": data}
    together = small_config(batch_size=1298, **same)
    parts = small_config(batch_size=256, accumulate=6, **same)
    for config in (together, parts):
        train(config, tmp_path / str(config.accumulate))
    weights = [RunFolder(tmp_path / name).load_weights("model.safetensors") for name in ("1", "6")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=1e-4)


def test_units_of_different_sizes_have_a_sparsity_of_their_own(tmp_path):
    method = Static(sparsity=0.5)
    summary = train(small_config(epochs=1, granularity="filter", method=method), tmp_path)
    assert summary["unit_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert summary["unit_sparsity"] != summary["sparsity"]
