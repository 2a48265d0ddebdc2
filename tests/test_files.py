import errno
import os

import pytest

from granet.files import write_atomically, write_text_atomically


def test_text_is_replaced(tmp_path):
    path = tmp_path / "file"
    write_text_atomically(path, "old")
    write_text_atomically(path, "neu è")
    assert path.read_text(encoding="utf-8") == "neu è"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write(file):
        file.write(b"half")
        if failing == "write":
            fail()

    if failing != "write":
        monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
