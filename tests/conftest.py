"""What every test runs under: a fixed plan, so that results have the same bits each time, and no cache of times.

Without a CUDA device Triton interprets its kernels, which has to be said before anything imports it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


# Most tests leave a core idle, and compiling all kernels for other chips takes minutes: so it begins with the tests.
_CODEGEN = pytest.StashKey[tuple[subprocess.Popen[bytes], Path]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or not any(item.path.name == "test_codegen.py" for item in session.items):
        return
    folder = Path(tempfile.mkdtemp(prefix="granet-codegen-"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = ["nice", sys.executable, "-m", "bench.codegen", "--csv", str(folder / "codegen.csv")]
    root = Path(__file__).parents[1]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT)
    session.config.stash[_CODEGEN] = process, folder


@pytest.fixture(scope="session")
def codegen_csv(pytestconfig: pytest.Config) -> Path:
    """What `python -m bench.codegen` has written of all kernels and chips."""
    process, folder = pytestconfig.stash[_CODEGEN]
    assert process.wait() == 0, (folder / "output").read_text()
    return folder / "codegen.csv"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _CODEGEN in session.config.stash:
        process, folder = session.config.stash[_CODEGEN]
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
