import sys

import pytest

from granet.tensorboard import row_writer


def test_nothing_is_written_unless_asked(tmp_path):
    row_writer([], tmp_path)({"epoch": 1, "train_loss": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_missing_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard is not installed; pip install 'granet\[tensorboard\]'"):
        row_writer(["tensorboard"], tmp_path)


def test_rows_become_events(tmp_path):
    pytest.importorskip("tensorboard")
    write = row_writer(["tensorboard"], tmp_path)
    write({"epoch": 1, "train_loss": 0.5, "validation_loss": None})
    write({"epoch": 2, "train_loss": 0.25, "validation_loss": None})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(1, 0.5), (2, 0.25)]
