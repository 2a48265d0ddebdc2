"""The native top-k against its specification, on sizes at which all its ways to find the threshold are taken."""

import contextlib
import itertools

import pytest
import torch
from scores import KINDS, counts_worth_trying

from granet_kernels import topk_mask
from granet_kernels.cpu_backend import library
from granet_kernels.reference import topk_mask_ref
from granet_kernels.topk import topk_mask_of_parts, topk_mask_op

pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason="there is no native library")

CHUNK = 2**16  # scores that the library reads at a time; segments of up to one chunk are not sampled


@pytest.fixture(autouse=True)
def results_of_garbage():
    """Memory that is not written shows: torch.empty is all True in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def everywhere(threads=(1, 2, 4)):
    """Run what follows with each instruction set that this CPU has and each number of threads; yields their names."""
    before = torch.get_num_threads()
    try:
        for isa, n in itertools.product(("avx512", "avx2", "portable"), threads):
            with contextlib.suppress(ValueError), library.isa_used(isa):
                torch.set_num_threads(n)
                yield f"{isa}, {n} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_any_count_of_a_long_segment(kind):
    for n, share in ((5 * CHUNK + 7, None), (3 * CHUNK, 0.3)):
        scores = KINDS[kind](n)
        eligible = None if share is None else torch.rand(n) < share
        offsets = torch.tensor([0, n])
        for count in counts_worth_trying(scores, eligible):
            counts = torch.tensor([count])
            expected = topk_mask_ref(scores, counts, offsets, eligible)
            for where in everywhere(threads=(1,)):
                mask = topk_mask_op([scores], counts, offsets, eligible, False)
                assert torch.equal(mask, expected), (count, where)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_of_very_different_size(kind):
    sizes = [3 * CHUNK + 1, 0, 1, 63, 64, 65, 0, CHUNK, CHUNK + 1, 2, 1000]
    parts = [KINDS[kind](size) for size in sizes]
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    eligible = torch.rand(sum(sizes)) < 0.6
    segments = list(itertools.pairwise(offsets.tolist()))
    for absolute, among in ((False, None), (False, eligible), (True, eligible)):
        available = [end - begin if among is None else int(among[begin:end].sum()) for begin, end in segments]
        counts = torch.tensor([(n + 2) // 3 for n in available])
        for args in (
            (parts, counts, offsets, among, absolute),
            (parts, counts.sum()[None], offsets[[0, -1]], among, absolute),
        ):
            expected = topk_mask_of_parts(*args)
            for where in everywhere():
                assert torch.equal(topk_mask_op(*args), expected), where


def test_ties_go_to_the_lowest_index_across_chunks():
    scores = torch.zeros(4 * CHUNK)
    scores[5::100] = 1
    ones, zeros = (scores == 1).nonzero().flatten(), (scores == 0).nonzero().flatten()
    for count in (700, 2 * CHUNK + 12345):
        expected = torch.cat([ones[:count], zeros[: max(0, count - len(ones))]]).sort().values
        for where in everywhere():
            assert torch.equal(topk_mask(scores, count).nonzero().flatten(), expected), where


def sampled_positions(n):
    """Where the library looks to guess the threshold of n scores."""
    samples = max(n // 256, 1024)
    stride, bits = n // samples, 2**64 - 1
    for i in range(samples):
        mixed = (i + 1) * 0x9E3779B97F4A7C15 & bits
        mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & bits
        yield i * stride + (mixed ^ mixed >> 32) % stride


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_mislead_the_sample(sign):
    scores = sign * torch.rand(4 * CHUNK)
    positions = torch.tensor(list(sampled_positions(len(scores))))
    scores[positions] = -sign * (1 + torch.rand(len(positions)))
    for count in (len(scores) // 10, len(scores) // 2):
        counts, offsets = torch.tensor([count]), torch.tensor([0, len(scores)])
        expected = topk_mask_ref(scores, counts, offsets)
        for where in everywhere():
            assert torch.equal(topk_mask(scores, count), expected), where


def test_denormals_count_where_the_processor_flushes_them():
    scores = torch.arange(2 * CHUNK, dtype=torch.int32).view(torch.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        for where in everywhere():
            mask = topk_mask(scores, CHUNK)
            assert not mask[:CHUNK].any(), where
            assert mask[CHUNK:].all(), where
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("available", [True, False], ids=["library", "no library"])
def test_without_the_library_the_reference_runs(available, monkeypatch):
    scores = torch.randn(1000)
    expected = topk_mask(scores, 100)
    calls = []
    native = library.load()
    monkeypatch.setattr(library, "load", lambda: calls.append(None) or (native if available else None))
    assert torch.equal(topk_mask(scores, 100), expected)
    assert calls


@pytest.mark.parametrize(
    "operands",
    [
        ([torch.randn(10)], torch.tensor([3]), torch.tensor([0, 4]), None),
        ([torch.randn(10)], torch.tensor([3]), torch.tensor([2, 10]), None),
        ([torch.randn(10)], torch.tensor([2, 1]), torch.tensor([0, 4, 8]), None),
        ([torch.randn(10)], torch.tensor([-1]), torch.tensor([0, 10]), None),
        ([torch.randn(0)], torch.tensor([], dtype=torch.int64), torch.tensor([0]), None),
        ([torch.randn(10)], torch.tensor([1, 2]), torch.tensor([0, 7, 10]), torch.ones(20, dtype=torch.bool)),
    ],
    ids=["short", "late", "short, two segments", "negative", "no segment", "long eligible"],
)
def test_operands_that_do_not_fit_are_for_the_specification(operands):
    """torch.ops.granet.topk_mask takes anything, and the library writes wherever the operands say."""
    got = torch.ops.granet.topk_mask(*operands, False)
    assert torch.equal(got, topk_mask_of_parts(*operands, False))


@pytest.mark.parametrize(
    ("dtype", "eligible"),
    [
        (torch.float16, None),
        (torch.float32, torch.ones(3, dtype=torch.bool)),
        (torch.float32, torch.ones(10)),
    ],
    ids=["half", "short", "float"],
)
def test_units_that_do_not_fit_are_refused_by_torch(dtype, eligible):
    scores = torch.randn(10, dtype=dtype)
    with pytest.raises((IndexError, RuntimeError)):
        torch.ops.granet.topk_mask([scores], torch.tensor([3]), torch.tensor([0, 10]), eligible, False)
