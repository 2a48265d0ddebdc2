"""The accuracy of a finished run, from its folder alone."""

from __future__ import annotations

import pytest
from training_support import small_config

from granet.checkpoint import CheckpointError
from granet.evaluate import evaluate_run, load_run, loss_and_accuracy, pick_device
from granet.methods import GMP
from granet.run import RunFolder
from granet.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    return folder, train(small_config(), folder)


def test_evaluation_repeats_the_summary(run):
    folder, summary = run
    result = evaluate_run(folder)
    assert result["test_accuracy"] == summary["test_accuracy"]
    assert result["test_loss"] == pytest.approx(summary["test_loss"])
    assert evaluate_run(folder, "best")["test_accuracy"] == summary["best_test_accuracy"]


@pytest.mark.parametrize("form", ["mask", "zero"])
def test_weights_of_a_mask_only_method_are_the_effective_ones(tmp_path, form):
    method = GMP(sparsity=0.8, update_every=2, form=form)
    summary = train(small_config(method=method, epochs=1), tmp_path / "run")
    assert evaluate_run(tmp_path / "run")["test_accuracy"] == summary["test_accuracy"]


def test_batch_size_does_not_matter(run):
    config, data, model = load_run(run[0])
    small, large = (
        loss_and_accuracy(model, data.test, small_config(batch_size=size)) for size in (7, data.test.examples)
    )
    assert small[1] == large[1]
    assert small[0] == pytest.approx(large[0], rel=1e-5)
    assert config == RunFolder(run[0]).load_config()


def test_weights_of_another_model_are_refused(run, tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(small_config(model="digits-cnn"))
    (tmp_path / "model.safetensors").write_bytes((run[0] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="the weights do not fit model 'digits-cnn'"):
        evaluate_run(tmp_path)


def test_unfinished_run_is_refused(tmp_path):
    RunFolder(tmp_path).create(small_config())
    with pytest.raises(FileNotFoundError, match="the run has not come so far"):
        evaluate_run(tmp_path)


def test_damaged_weights_are_refused(run, tmp_path):
    RunFolder(tmp_path).create(small_config())
    (tmp_path / "model.safetensors").write_bytes((run[0] / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="are damaged"):
        evaluate_run(tmp_path)


@pytest.mark.parametrize("name", ["quantum", "cuda:99", "meta?"])
def test_missing_device_is_named(name):
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda, got"):
        pick_device(name)
