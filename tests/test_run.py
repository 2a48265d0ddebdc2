import datetime

import pytest
import torch
from training_support import small_config

from granet import run as run_module
from granet.checkpoint import CheckpointError
from granet.config import config_dict
from granet.run import COLUMNS, RunFolder, check_resumable, new_run_folder, table_csv


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_masks_come_back(tmp_path, shape, density):
    masks = {"a.weight": torch.rand(shape) < density, "b.weight": torch.ones(2, 9, dtype=torch.bool)}
    folder = RunFolder(tmp_path)
    folder.write_masks("masks.safetensors", masks)
    loaded = folder.load_masks("masks.safetensors")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], masks[name]) for name in masks)


def test_masks_are_the_same_bytes_every_time(tmp_path):
    masks = {f"layer{index}.weight": torch.rand(5, index + 1) < 0.5 for index in range(20)}
    folder = RunFolder(tmp_path)
    folder.write_masks("first", masks)
    folder.write_masks("second", masks)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_tied_and_strided_weights_are_written(tmp_path):
    weight = torch.rand(4, 6)
    folder = RunFolder(tmp_path)
    folder.write_weights("w", {"a": weight, "b": weight, "c": weight.t()}, {})
    loaded = folder.load_weights("w")
    assert torch.equal(loaded["b"], weight)
    assert torch.equal(loaded["c"], weight.t())


def test_damaged_weights_are_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_weights("w", {"a": torch.rand(100)}, {})
    (tmp_path / "w").write_bytes((tmp_path / "w").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="w are damaged"):
        folder.load_weights("w")
    with pytest.raises(FileNotFoundError, match="the run has not come so far"):
        folder.load_weights("missing")


def test_metrics_come_back(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.load_metrics() == []
    rows = [dict.fromkeys(COLUMNS, index / 3) for index in range(2)]
    rows[0]["validation_loss"] = None
    folder.write_metrics(rows)
    assert folder.load_metrics() == rows


def test_csv_leaves_none_empty_and_quotes():
    assert table_csv([{"a": None, "b": [1, 2], "c": 0}], ("a", "b")) == 'a,b\n,"[1, 2]"\n'


def test_new_folders_do_not_collide(tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 5, 6, 7, 8, 9)

    monkeypatch.setattr(run_module.datetime, "datetime", Clock)
    names = []
    for _ in range(3):
        names.append(new_run_folder(small_config(model="torchvision/vgg19"), tmp_path).path.name)
    base = "20240506-070809-torchvision-vgg19-digits-granet"
    assert names == [base, f"{base}-2", f"{base}-3"]


def test_settings_that_change_no_result_may_differ(tmp_path):
    saved = config_dict(small_config())
    check_resumable(saved, small_config(threads=2, checkpoint_every=7, log=["tensorboard"], device="auto"), tmp_path)
    with pytest.raises(CheckpointError, match=r"seed: 0 -> 1; .*|differs in seed: 0 -> 1"):
        check_resumable(saved, small_config(seed=1), tmp_path)


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.held(), pytest.raises(FileExistsError, match="another process is training in"), folder.held():
        pass
    with folder.held():
        pass


def test_a_damaged_summary_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.summary_path.write_text('{"test_accuracy": 0.')
    with pytest.raises(CheckpointError, match=r"summary.json is damaged .*: delete it and resume the run"):
        folder.load_summary()
