"""What the Triton kernels become on chips that are not here: nothing spilled, nothing too large, wide loads."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.3")  # earlier ones compile by another interface

SELECTION = ("_bracket_kernel", "_collect_kernel", "_refine_kernel", "_mask_kernel")
BLOCKS = ("_block_matmul_kernel", "_block_wgrad_kernel")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Compiled in a process of its own: in this one Triton may be interpreting."""
    path = tmp_path_factory.mktemp("codegen") / "codegen.csv"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(path.parent / "cache")}
    command = [sys.executable, "-m", "bench.codegen", "--csv", str(path)]
    subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, check=True, stdout=subprocess.DEVNULL)
    with path.open() as file:
        return [
            {name: int(value) if value.isdecimal() else value for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def names(rows):
    return [f"{row['kernel']}, {row['case']}, {row['chip']}" for row in rows]


def test_every_kernel_is_compiled_for_every_chip(table):
    kernels = {row["kernel"] for row in table}
    assert kernels == {*SELECTION, *BLOCKS, "_block_wgrad_sum_kernel"}
    for kernel in kernels:
        assert {row["chip"] for row in table if row["kernel"] == kernel} == {"sm_70", "sm_80", "sm_90"}


def test_what_is_spilled(table):
    """The aim is nothing. ptxas still spills up to 8 registers of the two kernels that settle segments, some of them
    in their loops."""
    settling = ("_collect_kernel", "_refine_kernel")
    assert not names(row for row in table if row["local_bytes"] > (32 if row["kernel"] in settling else 0))


def test_shared_memory_is_within_the_chips_limit(table):
    assert not names(row for row in table if row["shared_bytes"] > row["shared_limit"])


def test_scores_are_streamed_in_vectors_of_16_bytes(table):
    passes = [row for row in table if row["kernel"] in ("_collect_kernel", "_mask_kernel")]
    wide = [row for row in passes if row["loads_128"] >= 2]
    assert names(wide) == names(row for row in passes if "unaligned" not in row["case"])


def test_blocks_are_multiplied_on_tensor_cores(table):
    """By wgmma on sm_90, and of float32, and on sm_70, by FMA."""
    blocks = [row for row in table if row["kernel"] in BLOCKS]
    half = [row for row in blocks if "bfloat16" in row["case"]]
    assert {row["chip"] for row in half} == {"sm_80", "sm_90"}
    assert names(row for row in half if row["hmma"]) == names(row for row in half if row["chip"] == "sm_80")
    assert names(row for row in half if row["hgmma"]) == names(row for row in half if row["chip"] == "sm_90")
    assert not names(row for row in half if row["ffma"] > 100)
    others = [row for row in blocks if row not in half]
    assert not names(row for row in others if row["hmma"] or row["hgmma"] or row["ffma"] < 256)


def test_blocks_are_streamed_in_vectors_of_16_bytes(table):
    """Both operands of each step; only of the narrowest blocks a thread has no more than 8 bytes in the one of them."""
    blocks = [row for row in table if row["kernel"] in BLOCKS and row["chip"] != "sm_70"]
    assert not names(row for row in blocks if row["loads_128"] < 4 * (row["stages"] - 1) or row["loads_narrow"])
    with_narrow = [row for row in blocks if row["loads_64"]]
    assert names(with_narrow) == names(row for row in blocks if " 16, " in row["case"])
    assert not names(row for row in with_narrow if row["loads_64"] > row["stages"])
