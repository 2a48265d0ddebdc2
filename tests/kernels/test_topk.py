from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from granet_kernels import drop, grow, topk_mask

NAN, INF, DENORMAL = math.nan, math.inf, 2.0**-149
FEW_VALUES = [0.0, -0.0, 1.0, -1.0, DENORMAL, -DENORMAL, 2 * DENORMAL, 3.4028235e38, INF, -INF, NAN, -NAN]


def scores_of(values):
    return torch.tensor(values, dtype=torch.float32)


def bools(text):
    """ "x.x" -> [True, False, True]."""
    return torch.tensor([c == "x" for c in text], dtype=torch.bool)


def naive_topk(scores, counts, offsets, eligible):
    """The specification with Python's sort: per segment, by NaN, by value, by lower index."""
    kept = [False] * len(scores)
    for count, begin, end in zip(counts, offsets[:-1], offsets[1:], strict=True):
        candidates = [i for i in range(begin, end) if eligible[i]]
        candidates.sort(key=lambda i: (-math.isnan(scores[i]), 0 if math.isnan(scores[i]) else -scores[i], i))
        for i in candidates[:count]:
            kept[i] = True
    return kept


@st.composite
def buffers(draw):
    """(scores, eligible, offsets, available per segment); few distinct values, or any float32."""
    value = draw(
        st.sampled_from([st.floats(width=32), st.sampled_from(FEW_VALUES), st.just(draw(st.floats(width=32)))])
    )
    scores = draw(st.lists(value, max_size=40))
    eligible = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    cuts = draw(st.lists(st.integers(0, len(scores)), max_size=4))
    offsets = [0, *sorted(cuts), len(scores)]
    available = [sum(eligible[a:b]) for a, b in itertools.pairwise(offsets)]
    return scores, eligible, offsets, available


def counts_within(data, available):
    return [data.draw(st.integers(0, n)) for n in available]


@settings(deadline=None, max_examples=200)
@given(buffers(), st.data())
def test_topk_is_pythons_stable_sort(buffer, data):
    scores, eligible, offsets, available = buffer
    counts = counts_within(data, available)
    mask = topk_mask(
        scores_of(scores), torch.tensor(counts), torch.tensor(offsets), torch.tensor(eligible, dtype=torch.bool)
    )
    assert mask.tolist() == naive_topk(scores_of(scores).tolist(), counts, offsets, eligible)


@settings(deadline=None)
@given(buffers(), st.data())
def test_drop_keeps_the_highest_of_the_kept(buffer, data):
    scores, kept, offsets, available = buffer
    n_drop = counts_within(data, available)
    left = drop(scores_of(scores), torch.tensor(kept, dtype=torch.bool), n_drop, offsets)
    counts = [a - d for a, d in zip(available, n_drop, strict=True)]
    assert left.tolist() == naive_topk(scores_of(scores).tolist(), counts, offsets, kept)


@settings(deadline=None)
@given(buffers(), st.data())
def test_grow_adds_the_highest_of_the_others(buffer, data):
    scores, free, offsets, available = buffer
    n_grow = counts_within(data, available)
    kept = ~torch.tensor(free, dtype=torch.bool)
    grown = grow(scores_of(scores), kept, n_grow, offsets)
    assert (grown & kept).tolist() == kept.tolist()
    assert (grown & ~kept).tolist() == naive_topk(scores_of(scores).tolist(), n_grow, offsets, free)


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([3, 1, 2], 2, "x.x"),
        ([1, 1, 1, 1], 2, "xx.."),
        ([-3, -1, -2], 1, ".x."),
        ([0.0, -0.0, 0.0], 1, "x.."),
        ([-0.0, 0.0, 0.0], 1, "x.."),
        ([0.0, DENORMAL, -DENORMAL], 1, ".x."),
        ([0.0, DENORMAL, -DENORMAL], 2, "xx."),
        ([INF, NAN, 1], 1, ".x."),
        ([INF, -NAN, NAN], 1, ".x."),
        ([-INF, -1, -INF], 2, "xx."),
        ([5], 0, "."),
        ([5], 1, "x"),
        ([], 0, ""),
    ],
    ids=str,
)
def test_hand_worked(scores, count, expected):
    assert topk_mask(scores_of(scores), count).tolist() == bools(expected).tolist()


def test_denormals_count_where_the_processor_flushes_them():
    scores = scores_of([0.0, DENORMAL, 2 * DENORMAL])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        assert topk_mask(scores, 1).tolist() == [False, False, True]
    finally:
        torch.set_flush_denormal(False)


def test_nan_ranks_alike_whatever_its_bits():
    bits = [0x7F800001, 0xFFC00000, 0x7FC00000, 0xFFFFFFFF, 0x7F800000]
    scores = torch.tensor([struct.unpack("i", struct.pack("I", b))[0] for b in bits], dtype=torch.int32)
    for count in range(5):
        assert topk_mask(scores.view(torch.float32), count).tolist() == [True] * count + [False] * (5 - count)


def test_segments_are_selected_apart():
    scores = scores_of([9, 8, 7, 1, 2, 3])
    assert topk_mask(scores, [1, 0, 2], [0, 3, 3, 6]).tolist() == bools("x...xx").tolist()
    assert topk_mask(scores, [0, 3, 0], [0, 0, 6, 6]).tolist() == bools("xxx...").tolist()
    assert topk_mask(scores, 2, [0, 3, 6]).tolist() == bools("xx..xx").tolist()


def test_units_just_dropped_may_grow_again():
    kept = bools("xxx..")
    left = drop(scores_of([3, 1, 2, 0, 0]), kept, 2)
    assert left.tolist() == bools("x....").tolist()
    assert grow(scores_of([0, 5, 1, 4, 3]), left, 2).tolist() == bools("xx.x.").tolist()


def test_drop_and_grow_break_ties_by_index():
    scores = torch.ones(6)
    assert drop(scores, bools("x.xx.x"), 2).tolist() == bools("x.x...").tolist()
    assert grow(scores, bools("x.xx.."), 2).tolist() == bools("xxxxx.").tolist()


def test_strided_scores():
    scores = scores_of([1, 9, 3, 9, 2, 9])[::2]
    assert topk_mask(scores, 1, eligible=bools("xxx.x.")[::2]).tolist() == [False, True, False]


def test_inputs_are_left_alone():
    scores, kept, counts, offsets = torch.randn(6), bools("x.xx.."), torch.tensor([1, 1]), torch.tensor([0, 3, 6])
    before = [t.clone() for t in (scores, kept, counts, offsets)]
    for result in (drop(scores, kept, counts, offsets), grow(scores, kept, counts, offsets)):
        result.fill_(True)
    for t, b in zip((scores, kept, counts, offsets), before, strict=True):
        assert torch.equal(t, b)


def test_absolute_ranks_by_magnitude():
    scores = scores_of([-3, 2, -0.0, NAN, -INF, 1])
    assert topk_mask(scores, 3, absolute=True).tolist() == bools("x..xx.").tolist()
    assert drop(scores, bools("xx.x.x"), 2, absolute=True).tolist() == bools("x..x..").tolist()
    assert grow(scores, bools("..xx.."), 2, absolute=True).tolist() == bools("x.xxx.").tolist()


@pytest.mark.parametrize(("counts", "offsets"), [(7, None), ([3, 2, 0], [0, 4, 8, 20]), ([3, 4], [0, 6, 20])], ids=str)
def test_a_list_of_tensors_stands_for_their_concatenation(counts, offsets):
    parts = [torch.randn(2, 2), torch.randn(0), torch.randn(4), torch.randn(12)[None], torch.randn(0)]
    flat = torch.cat([part.flatten() for part in parts])
    kept = torch.arange(20) % 3 != 0
    for op in (topk_mask, lambda *args: drop(args[0], kept, *args[1:]), lambda *args: grow(args[0], kept, *args[1:])):
        counts_of_op = counts if op is topk_mask else 1
        assert torch.equal(op(parts, counts_of_op, offsets), op(flat, counts_of_op, offsets))


def test_parts_of_any_layout_are_taken_row_major():
    weight = torch.randn(4, 6, 3, 3)
    for part in (weight.to(memory_format=torch.channels_last), weight.transpose(0, 1), weight[:, ::2]):
        assert torch.equal(topk_mask([part, weight], 50), topk_mask(torch.cat([part.flatten(), weight.flatten()]), 50))


def test_scores_at_odd_addresses():
    scores = torch.randn(1000)
    buffer = bytearray(b"." + scores.numpy().tobytes())
    assert torch.equal(topk_mask(torch.frombuffer(buffer, dtype=torch.float32, offset=1), 100), topk_mask(scores, 100))


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("eligible", [None, "xx.xxx.x"])
@pytest.mark.parametrize(("counts", "offsets"), [([3], [0, 8]), ([1, 0, 2], [0, 3, 3, 8])])
def test_opcheck(counts, offsets, eligible, absolute):
    parts = [torch.randn(3), torch.randn(5)]
    args = parts, torch.tensor(counts), torch.tensor(offsets), None if eligible is None else bools(eligible), absolute
    torch.library.opcheck(torch.ops.granet.topk_mask.default, args)


S4, K4 = torch.zeros(4), torch.tensor([True, True, False, False])
BAD = {
    "scores dtype": (topk_mask, (S4.double(), 1), "expected scores of dtype torch.float32, got torch.float64"),
    "scores 2-D": (topk_mask, (torch.zeros(2, 2), 1), r"expected scores of shape \(units,\), got shape \(2, 2\)"),
    "scores none": (topk_mask, ([], 1), "a tensor or a list of one tensor or more, got none"),
    "part dtype": (topk_mask, ([S4, S4.half()], 1), "expected scores of dtype torch.float32, got torch.float16"),
    "eligible dtype": (topk_mask, (S4, 1, None, S4), "expected eligible of dtype torch.bool, got torch.float32"),
    "eligible shape": (topk_mask, (S4, 1, None, K4[:3]), r"eligible of the scores' shape \(4,\), got shape \(3,\)"),
    "kept device": (drop, (S4, K4.to("meta"), 1), "expected kept on device cpu, got one on meta"),
    "count negative": (topk_mask, (S4, -1), r"0 <= counts <= 4 \(eligible units\) in segment 0, got -1"),
    "count too high": (topk_mask, (S4, [2, 3], [0, 2, 4]), r"<= 2 \(eligible units\) in segment 1, got 3"),
    "count not eligible": (topk_mask, (S4, 3, None, K4), r"<= 2 \(eligible units\) in segment 0, got 3"),
    "counts dtype": (topk_mask, (S4, [1.0]), r"counts to be a vector of int64, got shape \(1,\) of torch.float32"),
    "counts 0-D": (topk_mask, (S4, torch.tensor(1)), r"counts to be a vector of int64, got shape \(\) of torch.int64"),
    "counts many": (topk_mask, (S4, [1, 1]), "expected one of counts per segment, 1 in all, got 2"),
    "offsets start": (topk_mask, (S4, 1, [1, 4]), r"offsets that rise from 0 to the number of units 4, got \[1, 4\]"),
    "offsets end": (topk_mask, (S4, 1, [0, 3]), r"offsets that rise from 0 to the number of units 4, got \[0, 3\]"),
    "offsets fall": (topk_mask, (S4, 1, [0, 3, 2, 4]), r"offsets that rise .* got \[0, 3, 2, 4\]"),
    "offsets short": (topk_mask, (S4[:0], 0, [0]), r"offsets that rise .* got \[0\]"),
    "offsets empty": (topk_mask, (S4[:0], 0, []), r"offsets that rise .* got \[\]"),
    "drop too many": (drop, (S4, K4, [2, 1], [0, 2, 4]), r"0 <= n_drop <= 0 \(kept units\) in segment 1, got 1"),
    "grow too many": (grow, (S4, K4, [0, 3], [0, 2, 4]), r"<= 2 \(units that are not kept\) in segment 1, got 3"),
}


@pytest.mark.parametrize(("op", "args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments(op, args, message):
    with pytest.raises(ValueError, match=f"{op.__name__}: .*{message}"):
        op(*args)
