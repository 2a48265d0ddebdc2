import os
import pickle
import zipfile

import pytest
import torch
from training_support import same

from granet.checkpoint import NAME, PREVIOUS_NAME, CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint

STATE = {"weight": torch.arange(5000.0), "step": 3, "rows": [{"loss": 0.1, "text": "a", "none": None}]}


def test_state_comes_back(tmp_path):
    path = save_checkpoint(tmp_path, STATE)
    assert same(load_checkpoint(path), STATE)
    assert os.listdir(tmp_path) == [NAME]


def test_previous_checkpoint_is_kept(tmp_path):
    for step in range(3):
        save_checkpoint(tmp_path, {"step": step})
    assert load_checkpoint(tmp_path / NAME)["step"] == 2
    assert load_checkpoint(tmp_path / PREVIOUS_NAME)["step"] == 1


def test_killed_between_the_renames(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, {"step": 1})
    calls = []

    def replace(source, target, real=os.replace):
        calls.append(target)
        if len(calls) == 3:  # the incoming file, the previous one, and then the power goes
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, {"step": 2})
    monkeypatch.undo()
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert load_checkpoint(found)["step"] == 1
    save_checkpoint(tmp_path, {"step": 3})
    assert load_checkpoint(tmp_path / NAME)["step"] == 3


def test_no_checkpoint_is_found_in_an_empty_folder(tmp_path):
    assert find_checkpoint(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_checkpoint(tmp_path / NAME)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 0.999])
def test_truncated_checkpoint_is_refused(tmp_path, part):
    save_checkpoint(tmp_path, {"step": 1})
    path = save_checkpoint(tmp_path, STATE)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt is damaged.*previous one is .*checkpoint-previous\.pt"):
        load_checkpoint(path)


def test_changed_byte_of_a_tensor_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, STATE)
    content = bytearray(path.read_bytes())
    place = content.index(STATE["weight"].numpy().tobytes())
    content[place + 10_000] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"does not match its checksum|CRC"):
        load_checkpoint(path)


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "run"),))

    path = tmp_path / NAME
    torch.save({"x": Evil()}, path)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not (tmp_path / "run").exists()


def test_archive_of_something_else_is_refused(tmp_path):
    path = tmp_path / NAME
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="expected a dict, got list"):
        load_checkpoint(path)
