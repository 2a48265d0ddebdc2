"""Runs in processes of their own that are killed, or asked to stop, at a moment that they do not choose."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_support import assert_same_end, small_config

from granet.config import config_yaml
from granet.run import RunFolder
from granet.trainer import train

KILLS = int(os.environ.get("GRANET_KILLS", "3"))
CONFIG = small_config(epochs=14 * KILLS, checkpoint_every=3)


def start(folder: Path, config: Path | None = None) -> subprocess.Popen[str]:
    """`granet train` in a new process; resumes where `config` is not given."""
    arguments = ["--resume"] if config is None else ["--config", str(config)]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "granet", "train", "--run-dir", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Shells ignore Ctrl-C for background jobs, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_training(process: subprocess.Popen[str]) -> None:
    """Return once the process has made or found its folder."""
    assert process.stdout is not None
    process.stdout.readline()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    train(CONFIG, folder / "run")
    return folder / "run", time.monotonic() - began


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(config_yaml(CONFIG))
    return path


def test_killed_at_random_moments(whole, tmp_path, config_path):
    folder, moments, kills = tmp_path / "run", random.Random(0), 0
    process = start(folder, config_path)
    while kills < KILLS:
        wait_for_training(process)
        try:
            process.wait(moments.uniform(0, 0.6 * whole[1] / KILLS))
            break  # finished before the kill
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.communicate()
        process = start(folder)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert kills > 0
    assert_same_end(whole[0], folder)
    print(f"killed {kills} times, the same end")


def test_killed_before_the_first_checkpoint(whole, tmp_path):
    folder = tmp_path / "run"
    RunFolder(folder).create(CONFIG)
    process = start(folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "holds no checkpoint yet: starting from the beginning" in output
    assert_same_end(whole[0], folder)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signal_says_how_to_resume(tmp_path, config_path, signum):
    process = start(tmp_path / "run", config_path)
    wait_for_training(process)
    time.sleep(0.1)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    assert f"granet train --resume --run-dir {tmp_path / 'run'}" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoint.pt").exists()
