"""What the Triton kernels become on chips that are not here: nothing spilled, nothing too large, wide loads."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.3")  # earlier ones compile by another interface

SELECTION = ("_bracket_kernel", "_collect_kernel", "_refine_kernel", "_mask_kernel")
BLOCKS = ("_block_matmul_kernel", "_block_wgrad_kernel")
EVENT = ("_kept_kernel", "_total_kernel", "_drop_bracket_kernel", "_write_kernel")
GATHERS = {"_product_kernel", "_sampled_kernel"}
COPIES = {"_fill_kernel", "_pack_kernel", "_scatter_kernel", "_to_panels_kernel", "_from_panels_kernel"}
DENSE = {"_sampled_tile_kernel"}


@pytest.fixture(scope="module")
def table(codegen_csv):
    """Compiled in a process of its own: in this one Triton may be interpreting."""
    with codegen_csv.open() as file:
        return [
            {name: int(value) if value.isdecimal() else value for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def names(rows):
    return [f"{row['kernel']}, {row['case']}, {row['chip']}" for row in rows]


def test_every_kernel_is_compiled_for_every_chip(table):
    kernels = {row["kernel"] for row in table}
    assert kernels == {*SELECTION, *EVENT, *BLOCKS, "_block_wgrad_sum_kernel", *GATHERS, *COPIES, *DENSE}
    for kernel in kernels:
        assert {row["chip"] for row in table if row["kernel"] == kernel} == {"sm_70", "sm_80", "sm_90"}


def test_nothing_is_spilled(table):
    assert not names(row for row in table if row["local_bytes"])


def test_shared_memory_is_within_the_chips_limit(table):
    assert not names(row for row in table if row["shared_bytes"] > row["shared_limit"])


def test_scores_are_streamed_in_vectors_of_16_bytes(table):
    """Two loads of them in a block; the other two of the collect kernel are of its bins, and the write kernel has two
    each of the weights, and of state."""
    passes = {"_collect_kernel": 4, "_mask_kernel": 2, "_kept_kernel": 2, "_write_kernel": 4}
    rows = [row for row in table if row["kernel"] in passes]
    wide = [row for row in rows if row["loads_128"] >= passes[row["kernel"]]]
    assert names(wide) == names(row for row in rows if "unaligned" not in row["case"])


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


LAUNCHES = """
import torch
from bench.codegen_cases import distinct, recorded
from granet_kernels.triton_backend import block_linear as launchers
from granet_kernels.triton_backend.block_index import block_index

def launches():
    few = torch.eye(64, dtype=torch.bool)
    for blocks in (few, ~few):
        mask = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
        x, index = torch.zeros(1024, 1024), block_index(mask)
        yield from recorded([launchers], "", lambda: launchers.block_linear(x, x, index, None))
        yield from recorded([launchers], "", lambda: launchers.block_linear_wgrad(x, x, mask, index))

found = list(launches())
print(*(each.kernel.__name__ for each in found))
print(*(each.kernel.__name__ for each in distinct(found)))
"""


def test_a_change_of_the_mask_compiles_nothing_anew():
    """Of few blocks wgrad is summed in parts, of many at once, by the same kernel."""
    command, environment = [sys.executable, "-c", LAUNCHES], {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, check=True, stdout=subprocess.PIPE)
    launched, compiled = (Counter(line.split()) for line in done.stdout.decode().splitlines())
    assert launched == {"_block_matmul_kernel": 2, "_block_wgrad_kernel": 2, "_block_wgrad_sum_kernel": 1}
    assert set(compiled) == set(launched)
    assert set(compiled.values()) == {1}


def test_rows_are_gathered_in_loads_of_16_bytes_without_shared_memory(table):
    """A product has no other way for its operands; a weight gradient passes its sums through shared memory."""
    gathers = [row for row in table if row["kernel"] in GATHERS]
    assert not names(row for row in gathers if row["loads_128"] < 4)
    assert not names(row for row in gathers if row["shared_bytes"] > 4 * 256 * (row["kernel"] == "_sampled_kernel"))
    assert not names(row for row in gathers if row["registers"] > 64)  # or fewer programs would be resident


def test_panels_are_copied_in_vectors_of_16_bytes(table):
    copies = [row for row in table if row["kernel"] in ("_to_panels_kernel", "_from_panels_kernel")]
    wide = [row for row in copies if row["loads_128"] >= 4 and row["stores_128"] >= 4]
    assert names(wide) == names(row for row in copies if "even" in row["case"])


def test_dense_tiles_run_on_tensor_cores(table):
    half = [row for row in table if row["kernel"] in DENSE and "bfloat16" in row["case"]]
    assert {(row["chip"], row["hmma"] > 0, row["hgmma"] > 0) for row in half} == {
        ("sm_70", False, False),
        ("sm_80", True, False),
        ("sm_90", False, True),
    }


def test_a_change_of_the_mask_compiles_nothing(table):
    """Every case runs with two masks: only what differs by direction may appear twice."""
    kernels = [(row["kernel"], row["case"], row["chip"]) for row in table if row["kernel"] in GATHERS | COPIES | DENSE]
    twice = {"_product_kernel", "_pack_kernel", "_to_panels_kernel"}
    assert not [each for each in set(kernels) if kernels.count(each) > (2 if each[0] in twice else 1)]


def test_what_is_written_is_written_in_vectors_of_16_bytes(table):
    rows = [row for row in table if row["kernel"] == "_write_kernel" and "unaligned" not in row["case"]]
    assert rows
    assert not names(row for row in rows if row["stores_128"] < 4)
