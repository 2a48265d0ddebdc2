"""bench/gpu.sh without a GPU: it says so, and a dry run walks through every stage."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


def run(*arguments, out):
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "TRITON_INTERPRET": ""}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_dry_run(tmp_path):
    done = run("--dry", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "topk_gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["implementation"] for row in rows} >= {"granet", "granet, segments", "torch.topk", "torch.kthvalue"}
    assert all(float(row["ms_median"]) > 0 for row in rows)
    for name, implementations in {
        "linear_gpu": {
            "granet",
            "granet, one graph",
            "granet, dense tiles",
            "dense float32 (IEEE)",
            "dense tf32",
            "csr",
        },
        "event_gpu": {"granet", "granet, selection by selection", "torch.topk by layer"},
    }.items():
        with (tmp_path / f"{name}.csv").open() as file:
            assert {row["implementation"] for row in csv.DictReader(file)} == implementations
    with (tmp_path / "tilings_gpu.csv").open() as file:
        assert {row["direction"] for row in csv.DictReader(file)} == {"forward", "dgrad", "wgrad"}
    assert "interpreted" in (tmp_path / "gpu.log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = run(out=tmp_path / "results")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "results").exists()
