"""Imports point one way, and the kernels know nothing of granet."""

import ast
from pathlib import Path

import pytest

import granet
import granet_kernels

PACKAGES = {"granet": Path(granet.__file__).parent, "granet_kernels": Path(granet_kernels.__file__).parent}

# From the bottom up: a module imports what stands before it, or beside it in its own line.
LAYERS = [
    {"granularity", "distribution", "schedule"},
    {"methods"},
    {"modules", "masked"},
    {"convert", "topology"},
    {"optimizer_state", "gradients", "report", "sparsifier_state"},
    {"mask_update"},
    {"sparsifier"},
    {"trainer"},
    {"cli"},
]


def imports(path, package):
    """Dotted names of the modules of `package` that a file imports when it is run."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == package)


@pytest.mark.parametrize("path", sorted(PACKAGES["granet_kernels"].rglob("*.py")), ids=lambda path: path.stem)
def test_kernels_do_not_import_granet(path):
    assert not list(imports(path, "granet"))


@pytest.mark.parametrize("level", range(len(LAYERS)), ids=lambda level: "-".join(sorted(LAYERS[level])))
def test_imports_point_down(level):
    above = set().union(*LAYERS[level + 1 :])
    root = PACKAGES["granet"]
    for name in LAYERS[level]:
        files = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
        assert files
        for path in files:
            assert path.exists()
            used = {parts[1] for parts in (i.split(".") for i in imports(path, "granet")) if len(parts) > 1}
            assert not used & above, f"{path.name} imports {used & above}"


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_imports_tests_or_benchmarks(package):
    for path in PACKAGES[package].rglob("*.py"):
        assert not list(imports(path, "tests"))
        assert not list(imports(path, "bench"))
