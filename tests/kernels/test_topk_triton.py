"""The selection in Triton against its specification: on a CUDA device, or interpreted in CPU memory.

Blocks are made small, so that a few thousand scores take every way that billions take.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scores import KINDS, counts_worth_trying

from granet_kernels.topk import topk_mask_of_parts

pytest.importorskip("triton")

from granet_kernels.triton_backend import table, topk
from granet_kernels.triton_backend.topk import topk_mask_triton

pytestmark = pytest.mark.usefixtures("results_of_garbage")

BLOCK, SAMPLE = 128, 256


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(table, "BLOCK", BLOCK)
    monkeypatch.setattr(table, "THREADS", 16)
    monkeypatch.setattr(table, "BINS", 64)
    monkeypatch.setattr(table, "CHUNK", 8 * BLOCK)
    monkeypatch.setattr(table, "SAMPLE", SAMPLE)
    monkeypatch.setattr(table, "LARGE", 1024)
    monkeypatch.setattr(table, "_tables", {})


def check(device, parts, counts, offsets, eligible=None, absolute=False):
    """Raise unless the mask is that of the specification."""
    expected = topk_mask_of_parts(parts, counts, offsets, eligible, absolute)
    moved = [part.to(device) for part in parts]
    flags = None if eligible is None else eligible.to(device)
    mask = topk_mask_triton(moved, counts, offsets, flags, absolute)
    assert mask.dtype == torch.bool
    assert mask.device.type == device
    assert torch.equal(mask.cpu(), expected), (counts.tolist(), (mask.cpu() != expected).nonzero()[:5].flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_any_count_of_one_segment(kind, device, small_blocks):
    for number, (n, share) in enumerate(((3 * SAMPLE + 7, None), (2000, 0.3))):
        scores = KINDS[kind](n)
        eligible = None if share is None else torch.rand(n) < share
        counts = counts_worth_trying(scores, eligible)
        for count in counts if device == "cuda" else counts[number::2]:
            check(device, [scores], torch.tensor([count]), torch.tensor([0, n]), eligible)


@pytest.mark.parametrize("kind", ["special", "bfloat16", "atoms"])
def test_segments_of_very_different_size(kind, device, small_blocks):
    sizes = [3 * SAMPLE + 1, 0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 0, SAMPLE, SAMPLE + 1, 2, 100, 0]
    parts = [KINDS[kind](size) for size in sizes]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    eligible = torch.rand(sum(sizes)) < 0.6
    segments = list(itertools.pairwise(offsets.tolist()))
    for absolute, among in ((False, None), (True, eligible)):
        available = [end - begin if among is None else int(among[begin:end].sum()) for begin, end in segments]
        counts = torch.tensor([(n + 2) // 3 for n in available])
        check(device, parts, counts, offsets, among, absolute)
        check(device, parts, counts.sum()[None], offsets[[0, -1]], among, absolute)


def test_segments_and_tensors_that_overlap(device, small_blocks):
    """Strided tensors, tensors that begin anywhere in memory, segments of parts of several of them."""
    parts = [
        torch.randn(50, 30).t(),
        torch.randn(0, 3),
        torch.randn(901)[1:],
        torch.randn(7, 9)[:, ::2],
        torch.randn(1),
    ]
    total = sum(part.numel() for part in parts)
    offsets = torch.tensor([0, 3, 3, 1490, 1510, total - 2, total])
    check(device, parts, torch.tensor([2, 0, 400, 11, 1, 1]), offsets)
    check(device, parts, torch.tensor([700]), offsets[[0, -1]], torch.rand(total) < 0.9, True)


@pytest.mark.parametrize("n", [1, 7, 63, 100, 300])
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "unaligned"])
def test_odd_sizes(n, aligned, device, small_blocks):
    scores = torch.randn(n + 4)[0 if aligned else 1 :][:n]
    for count in {0, 1, n // 2, n}:
        check(device, [scores], torch.tensor([count]), torch.tensor([0, n]))


def test_blocks_of_full_size(device):
    scores = torch.randn(3 * table.BLOCK + 5)
    check(device, [scores], torch.tensor([5000]), torch.tensor([0, len(scores)]), absolute=True)
    parts = [torch.randn(20 * 30), torch.randn(1000), torch.zeros(9)]
    check(device, parts, torch.tensor([100, 999, 4]), torch.tensor([0, 600, 1600, 1609]), torch.rand(1609) < 2)


def test_ties_go_to_the_lowest_index_across_tiles(device, small_blocks):
    scores = torch.zeros(20 * BLOCK)
    scores[5::10] = 1
    for count in (100, 700):
        check(device, [scores], torch.tensor([count]), torch.tensor([0, len(scores)]))


def sampled_positions(n, sample):
    """Where the kernels look to guess the threshold among n scores."""
    for i in range(sample):
        mixed = i * 0x9E3779B1 & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 15) * 0x5BD1E995 & 0xFFFFFFFF
        yield i * n // sample + ((mixed ^ mixed >> 13) * (n // sample) >> 32)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_mislead_the_sample(sign, device, small_blocks):
    n = 4 * SAMPLE
    scores = sign * torch.rand(n)
    positions = torch.tensor(list(sampled_positions(n, SAMPLE)))
    scores[positions] = -sign * (1 + torch.rand(len(positions)))
    for count in (n // 10, n // 2, n - n // 10):
        check(device, [scores], torch.tensor([count]), torch.tensor([0, n]))


@pytest.mark.parametrize("capacities", [(1, 1), (1000, 1)], ids=["inside", "bin"])
def test_more_codes_than_a_buffer_holds(capacities, device, small_blocks, monkeypatch):
    """Then what they were written from is searched."""
    monkeypatch.setattr(table, "SAMPLE", 1024)
    monkeypatch.setattr(table, "CHUNK", BLOCK)
    monkeypatch.setattr(table, "_capacities", lambda units: capacities)
    scores = torch.randn(1000)
    for count in (100, 300):
        check(device, [scores], torch.tensor([count]), torch.tensor([0, 1000]))


def test_counts_out_of_range(device, small_blocks):
    """The op takes them as they come: checking counts in device memory would mean to wait for it."""
    scores, eligible = torch.randn(1000).to(device), (torch.rand(1000) < 0.5).to(device)
    for count, expected in ((-3, torch.zeros_like(eligible)), (1000, eligible)):
        mask = topk_mask_triton([scores], torch.tensor([count]), torch.tensor([0, 1000]), eligible, False)
        assert torch.equal(mask, expected)


def test_counts_in_device_memory(device, small_blocks):
    scores = torch.randn(500)
    counts, offsets = torch.tensor([20, 30]), torch.tensor([0, 100, 500])
    mask = topk_mask_triton([scores.to(device)], counts.to(device), offsets, None, False)
    assert torch.equal(mask.cpu(), topk_mask_of_parts([scores], counts, offsets, None, False))


def test_too_long_a_segment_goes_to_the_reference(device, monkeypatch):
    monkeypatch.setattr(topk, "MOST_UNITS", 10)
    monkeypatch.setattr(topk, "find", None)
    check(device, [torch.randn(11)], torch.tensor([4]), torch.tensor([0, 11]))


def test_tables_are_kept_and_forgotten(device, monkeypatch):
    monkeypatch.setattr(table, "_tables", {})
    scores = [torch.randn(10, device=device) for _ in range(100)]
    first = table.table_of(scores[:1], [0, 10])
    assert table.table_of(scores[:1], [0, 10]) is first
    for each in scores[1:]:
        table.table_of([each], [0, 10])
    assert len(table._tables) <= 64
    assert table.table_of(scores[:1], [0, 10]) is not first
    assert first != table.table_of(scores[:2], [0, 20])  # a comparison of their tensors would wait, or raise


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_captured_graphs():
    scores, counts = torch.randn(5000, device="cuda"), torch.tensor([20, 30], device="cuda")
    graphs, masks = [], []
    for bounds in ([0, 5000, 5000], [0, 100, 5000]):
        given = [scores], counts * torch.tensor([1, len(set(bounds)) - 2], device="cuda"), torch.tensor(bounds)
        topk_mask_triton(*given, None, True)
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            masks.append(topk_mask_triton(*given, None, True))
    scores.normal_()
    for graph, mask, expected in zip(graphs, masks, (20, 50), strict=True):
        graph.replay()
        assert int(mask.count_nonzero()) == expected
        assert bool(mask[scores[:100].abs().argmax()]) or expected == 20


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_topk_is_a_stable_sort(data):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    value = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, 2.0**-149, float("inf"), float("nan")]))
    values = data.draw(st.lists(value, min_size=1, max_size=60))
    n = len(values)
    cut = data.draw(st.integers(0, n))
    counts = [data.draw(st.integers(0, cut)), data.draw(st.integers(0, n - cut))]
    check(
        device, [torch.tensor(values)], torch.tensor(counts), torch.tensor([0, cut, n]), None, data.draw(st.booleans())
    )
