"""The native library: what is built, how it is found, what is refused, and whose threads it uses."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from granet_kernels.cpu_backend import library

CSRC = Path(library.__file__).with_name("csrc")
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_source = pytest.mark.skipif(not CSRC.exists(), reason="an installed package has no C++ source")
needs_library = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))


def _forget() -> None:
    for cached in (library._found, library._switched_on, library._warn_once, library._has_openmp):
        cached.cache_clear()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A function that sets environment variables as if the process had started with them."""

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        _forget()

    yield set_variables
    _forget()


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[[str], Path]:
    """A function C++ source -> shared library, linked without an OpenMP runtime as setup.py does."""

    def build(source: str) -> Path:
        code, path = tmp_path / "code.cpp", tmp_path / "library.so"
        code.write_text(source)
        for step in (["-fPIC", "-c", str(code), "-o", f"{code}.o"], ["-shared", f"{code}.o", "-o", str(path)]):
            openmp = ["-fopenmp"] if "-c" in step and "omp" in source else []
            subprocess.run([str(COMPILER), *openmp, *step], check=True, capture_output=True)
        return path

    return build


def _functions(version: int, without: str = "") -> str:
    """C++ source with all the functions of the library but one; all return the version."""
    names = [name for name in library.SIGNATURES if name != without]
    return "".join(f'extern "C" int {name}() {{ return {version}; }}\n' for name in names)


def _in_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )


@needs_compiler
def test_there_is_a_library_where_there_is_a_compiler():
    if os.environ.get("GRANET_NATIVE") == "0":
        pytest.skip("switched off by GRANET_NATIVE=0")
    assert library.unavailable() is None
    assert library.load() is not None
    assert library.isa() in ("avx512", "avx2", "portable")


@needs_source
def test_declarations_are_those_of_the_header():
    header = (CSRC / "granet_cpu.h").read_text()
    assert f"#define GRANET_ABI_VERSION {library.ABI_VERSION}\n" in header
    declared = {
        name: 0 if parameters == "void" else parameters.count(",") + 1
        for name, parameters in re.findall(r"^GRANET_API .*?(granet_\w+)\(([^)]*)\);", header, re.MULTILINE)
    }
    assert declared == {name: len(arguments) for name, (_, arguments) in library.SIGNATURES.items()}
    fields = re.search(r"int64_t (n, [^;]*);\s*} granet_conv;", header)
    assert fields is not None
    assert fields[1].split(", ") == [name for name, *_ in library.Conv._fields_]


@needs_source
def test_a_source_distribution_has_all_of_the_source():
    assert {path.suffix for path in CSRC.iterdir()} <= {".cpp", ".h", ".inl"}  # as in MANIFEST.in


@needs_compiler
@pytest.mark.parametrize(
    ("version", "without", "message"),
    [
        (library.ABI_VERSION + 1, "", f"expected version {library.ABI_VERSION}, got {library.ABI_VERSION + 1}"),
        (library.ABI_VERSION, "granet_conv2d_wgrad", "lacks the function granet_conv2d_wgrad"),
        (library.ABI_VERSION, "granet_abi_version", "lacks the function granet_abi_version"),
    ],
    ids=["version", "function", "no version"],
)
def test_library_that_does_not_fit_is_refused(environment, compiled, version, without, message):
    path = compiled(_functions(version, without))
    environment(GRANET_LIBRARY=str(path), GRANET_NATIVE="1")
    reason = library.unavailable()
    assert reason is not None
    assert str(path) in reason
    assert message in reason
    assert "\n" not in reason


@needs_compiler
def test_library_that_fits_is_taken_from_the_environment(environment, compiled):
    own = library.digest()
    environment(GRANET_LIBRARY=str(compiled(_functions(library.ABI_VERSION))), GRANET_NATIVE="1")
    assert len(library.digest()) == 8
    assert library.digest() != own
    assert library.unavailable() is None
    assert library.load() is library.load()


@needs_compiler
def test_missing_openmp_functions_are_named(environment, compiled):
    source = 'extern "C" void GOMP_of_the_future();\nextern "C" void call() { GOMP_of_the_future(); }\n'
    environment(GRANET_LIBRARY=str(compiled(source)), GRANET_NATIVE="1")
    assert "GOMP_of_the_future" in str(library.unavailable())


def test_without_a_library_one_warning_says_so(environment, tmp_path):
    environment(GRANET_LIBRARY=str(tmp_path / "nothing.so"), GRANET_NATIVE="1")
    with pytest.warns(RuntimeWarning, match=r"nothing\.so.*dense cost") as caught:
        assert [library.load() for _ in range(2)] == [None, None]
    assert len(caught) == 1
    assert library.isa() == "reference"
    with pytest.raises(RuntimeError, match=r"nothing\.so"), library.isa_used("portable"):
        pass


def test_nothing_was_built(environment, monkeypatch):
    environment(GRANET_LIBRARY="", GRANET_NATIVE="1")
    monkeypatch.setattr(library, "EXTENSION_SUFFIXES", [".none"])
    assert "installed without" in str(library.unavailable())


def test_switched_off_silently(environment):
    environment(GRANET_NATIVE="0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.load() is None
    assert "GRANET_NATIVE=0" in str(library.unavailable())


def test_switch_is_0_or_1(environment):
    environment(GRANET_NATIVE="off")
    with pytest.raises(ValueError, match="expected 0 or 1, got 'off'"):
        library.load()


def test_doctor_says_what_runs():
    code = "from granet.cli import main; main(['doctor', 'mlp'])"
    result = _in_python(code, GRANET_NATIVE="0")
    assert "native CPU code: none, GRANET_NATIVE=0" in result.stdout
    assert "GRANET_NATIVE" not in result.stderr


@needs_library
def test_each_code_that_the_cpu_has_can_be_forced():
    best = library.isa()
    codes = ["portable", "avx2", "avx512"]
    for name in codes[: codes.index(best) + 1]:
        with library.isa_used(name):
            assert library.isa() == name
        assert library.isa() == best
    with pytest.raises(ValueError, match="got 'avx1024'"), library.isa_used("avx1024"):
        pass


@needs_library
def test_library_names_no_openmp_runtime():
    path = library._path()
    assert path is not None
    assert b"libgomp" not in path.read_bytes()


@needs_library
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_process_has_one_openmp_runtime():
    code = """
from granet_kernels.cpu_backend import library
assert library.load() is not None
print({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line})
"""
    runtimes = eval(_in_python(code).stdout)
    assert len(runtimes) == library.load().granet_has_openmp(), runtimes


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP runtime")
def test_library_runs_on_as_many_threads_as_it_is_told(environment, compiled):
    team = """
#include <omp.h>
extern "C" int team(int threads) {
    int n = 0;
#pragma omp parallel num_threads(threads) reduction(+ : n)
    ++n;
    return n;
}
"""
    path = compiled(_functions(library.ABI_VERSION) + team)
    environment(GRANET_LIBRARY=str(path), GRANET_NATIVE="1")
    loaded = library.load()
    assert isinstance(loaded, ctypes.CDLL)
    assert [loaded.team(threads) for threads in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_child_uses_one_thread():
    assert library.threads() in (1, torch.get_num_threads())
    child = os.fork()
    if child == 0:
        os._exit(library.threads())
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1


def test_threads_follow_torch(monkeypatch):
    monkeypatch.setattr(library, "_has_openmp", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert library.threads() == 7
    monkeypatch.setattr(library, "_has_openmp", lambda: False)
    assert library.threads() == 1


@pytest.mark.parametrize(("status", "error"), [(1, MemoryError), (2, RuntimeError), (7, RuntimeError)])
def test_status_is_raised(status, error):
    library.check(0)
    with pytest.raises(error):
        library.check(status)
