"""What every test runs under: a fixed plan, so that results have the same bits each time, and no cache of times.

Without a CUDA device Triton interprets its kernels, which has to be said before anything imports it.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["GRANET_PLAN"] = "native"
os.environ["GRANET_PLAN_CACHE"] = ""


@pytest.fixture(autouse=True)
def _native_plan() -> Iterator[None]:
    """Whatever the sessions of other tests, and of shared fixtures, have made the plan of the process."""
    from granet_kernels import plan  # not before the environment is set

    with plan.use(os.environ["GRANET_PLAN"]):
        yield


# Compiling all kernels for other chips takes minutes: it begins with the tests, once whatever the number of workers.
_FOLDER = "GRANET_TEST_CODEGEN"
_CODEGEN = pytest.StashKey[subprocess.Popen[bytes]]()
_RUN = "import pathlib, subprocess, sys; pathlib.Path(sys.argv[1]).write_text(str(subprocess.call(sys.argv[2:])))"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        os.environ[_FOLDER] = tempfile.mkdtemp(prefix="granet-codegen-")


def pytest_collection_finish(session: pytest.Session) -> None:
    if not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        _start_codegen(session.config, [item.nodeid for item in session.items])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: Sequence[str]) -> None:
    _start_codegen(node.config, ids)


def _start_codegen(config: pytest.Config, ids: Sequence[str]) -> None:
    if _CODEGEN in config.stash or not any("test_codegen.py" in each for each in ids):
        return
    folder = Path(os.environ[_FOLDER])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = ["nice", sys.executable, "-m", "bench.codegen", "--csv", str(folder / "codegen.csv")]
    config.stash[_CODEGEN] = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(folder / "status"), *command],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=(folder / "output").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.fixture(scope="session")
def codegen_csv() -> Path:
    """What `python -m bench.codegen` has written of all kernels and chips."""
    folder = Path(os.environ[_FOLDER])
    while not (folder / "status").exists() or not (folder / "status").read_text():
        time.sleep(0.1)
    assert (folder / "status").read_text() == "0", (folder / "output").read_text()
    return folder / "codegen.csv"


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    if _CODEGEN in config.stash:
        with suppress(ProcessLookupError):
            os.killpg(config.stash[_CODEGEN].pid, signal.SIGTERM)
        config.stash[_CODEGEN].wait()
    shutil.rmtree(os.environ[_FOLDER], ignore_errors=True)
