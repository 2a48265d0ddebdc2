"""Units of sparsity: their order, their reductions, and the selection keys of N:M."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from granet.granularity import NM, Block, Filter, Granularity, Unstructured, parse

FLOAT_MAX = torch.finfo(torch.float32).max
DENORMAL = 2.0**-149

FITTING = [
    (Unstructured(), (3, 5)),
    (Unstructured(), (63, 7, 3, 3)),
    (Block(2, 3), (4, 6)),
    (Block(1, 1), (3, 5)),
    (Block(4, 6), (4, 6)),
    (Block(2, 9), (6, 5, 3, 3)),
    (Block(3, 1), (3, 7)),
    (NM(2, 4), (3, 8)),
    (NM(1, 3), (5, 2, 3)),
    (NM(1, 2), (7, 2, 1, 1)),
    (Filter(), (5, 1)),
    (Filter(), (7, 3, 3, 3)),
]
fitting = pytest.mark.parametrize(("granularity", "shape"), FITTING, ids=[f"{g}-{s}" for g, s in FITTING])


def highest(keys: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest keys, ties to the lower index."""
    kept = torch.zeros(keys.numel(), dtype=torch.bool)
    kept[keys.argsort(descending=True, stable=True)[:count]] = True
    return kept


# Units, reduce, expand, contract


@fitting
def test_units_times_size_is_the_whole_weight(granularity: Granularity, shape: tuple[int, ...]) -> None:
    assert granularity.units(shape) * granularity.unit_size(shape) == torch.Size(shape).numel()


@fitting
def test_contract_is_the_inverse_of_expand(granularity: Granularity, shape: tuple[int, ...]) -> None:
    kept = torch.rand(granularity.units(shape), generator=torch.Generator().manual_seed(1)) < 0.5
    mask = granularity.expand(kept, shape)
    assert mask.shape == shape
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert mask.sum() == kept.sum() * granularity.unit_size(shape)
    assert torch.equal(granularity.contract(mask), kept)


@fitting
def test_expanded_and_contracted_masks_are_copies(granularity: Granularity, shape: tuple[int, ...]) -> None:
    kept = torch.ones(granularity.units(shape), dtype=torch.bool)
    mask = granularity.expand(kept, shape)
    granularity.contract(mask).fill_(False)
    mask[0, 0] = False
    assert kept.all()
    assert mask.sum() == mask.numel() - mask[0, 0].numel()


@fitting
def test_reduce_of_an_expanded_mask_is_the_units(granularity: Granularity, shape: tuple[int, ...]) -> None:
    kept = torch.rand(granularity.units(shape), generator=torch.Generator().manual_seed(2)) < 0.5
    reduced = granularity.reduce(granularity.expand(kept, shape).to(torch.bfloat16))
    assert reduced.dtype == torch.float32
    assert torch.equal(reduced, kept.float())


def test_block_units_are_row_major_over_the_blocks() -> None:
    weight = torch.arange(16.0).reshape(4, 4)
    assert Block(2, 2).reduce(weight).tolist() == [2.5, 4.5, 10.5, 12.5]
    assert Block(1, 4).reduce(weight).tolist() == [1.5, 5.5, 9.5, 13.5]
    mask = Block(2, 2).expand(torch.tensor([True, False, False, True]), (4, 4))
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_filter_reduces_to_the_mean_of_each_output() -> None:
    assert Filter().reduce(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.5]])).tolist() == [3.0, pytest.approx(1 / 6)]


@pytest.mark.parametrize("granularity", [Unstructured(), Block(2, 9), NM(3, 6), Filter()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_memory_format_does_not_change_the_units(granularity: Granularity, dtype: torch.dtype) -> None:
    weight = torch.rand(4, 6, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    strided = torch.zeros(4, 6, 3, 6, dtype=dtype)[..., ::2].copy_(weight)
    expected = granularity.reduce(weight)
    assert expected.shape == (granularity.units(weight.shape),)
    assert torch.equal(granularity.reduce(weight.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(granularity.reduce(strided), expected)


def test_single_weights_are_copied_exactly() -> None:
    weight = torch.tensor([[0.1, DENORMAL, FLOAT_MAX]], requires_grad=True)
    scores = Unstructured().reduce(weight)
    assert torch.equal(scores, weight.detach().reshape(-1))
    assert not scores.requires_grad
    assert scores.data_ptr() != weight.data_ptr()


def test_means_are_accumulated_in_float64() -> None:
    weight = torch.ones(1, 2**12, dtype=torch.float16)
    weight[0, 0] = 60000.0
    exact = (60000 + 2**12 - 1) / 2**12
    assert Filter().reduce(weight).item() == torch.tensor(exact, dtype=torch.float32).item()
    assert Block(1, 2**12).reduce(weight).item() == torch.tensor(exact, dtype=torch.float32).item()


# Errors


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (Block(2, 3), (4, 7), r"2 x 3 blocks, got 4 x 7 \(shape \(4, 7\)\)"),
        (Block(64, 64), (64, 3, 3, 3), r"64 x 64 blocks, got 64 x 27 \(shape \(64, 3, 3, 3\)\)"),
        (NM(2, 4), (8, 3, 3, 3), r"groups of 4 for 2:4, got rows of 27"),
        (Unstructured(), (5,), r"two or more non-empty dimensions, got shape \(5,\)"),
        (Filter(), (5, 0), r"two or more non-empty dimensions, got shape \(5, 0\)"),
    ],
    ids=str,
)
def test_shape_that_does_not_fit(granularity: Granularity, shape: tuple[int, ...], message: str) -> None:
    for call in (
        lambda: granularity.units(shape),
        lambda: granularity.unit_size(shape),
        lambda: granularity.reduce(torch.zeros(shape)),
        lambda: granularity.expand(torch.zeros(1, dtype=torch.bool), shape),
        lambda: granularity.contract(torch.zeros(shape, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("granularity", [Unstructured(), Block(2, 2), NM(2, 4), Filter()], ids=str)
def test_kept_units_of_the_wrong_form(granularity: Granularity) -> None:
    units = granularity.units((4, 4))
    with pytest.raises(ValueError, match=rf"\({units},\) bool, got \({units + 1},\) torch.bool"):
        granularity.expand(torch.ones(units + 1, dtype=torch.bool), (4, 4))
    with pytest.raises(ValueError, match=rf"\({units},\) bool, got \({units},\) torch.float32"):
        granularity.expand(torch.ones(units), (4, 4))
    with pytest.raises(ValueError, match=r"bool mask, got torch\.float32"):
        granularity.contract(torch.ones(4, 4))


@pytest.mark.parametrize("granularity", [Block(2, 2), Filter()], ids=str)
def test_contract_refuses_a_unit_kept_in_part(granularity: Granularity) -> None:
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[3, 0] = False
    with pytest.raises(ValueError, match="kept in part"):
        granularity.contract(mask)


@pytest.mark.parametrize("sizes", [(0, 4), (4, -1), (2.0, 4), (True, 4)], ids=str)
def test_block_of_bad_size(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="positive integers"):
        Block(*sizes)


@pytest.mark.parametrize("pattern", [(0, 4), (4, 4), (5, 4), (-1, 4), (1.0, 4)], ids=str)
def test_pattern_out_of_range(pattern: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 < n < m"):
        NM(*pattern)


# Texts


@pytest.mark.parametrize(
    ("text", "granularity"),
    [
        ("unstructured", Unstructured()),
        ("filter", Filter()),
        ("block:64x32", Block(64, 32)),
        ("block:64", Block(64, 64)),
        (" Block:8X4 ", Block(8, 4)),
        ("2:4", NM(2, 4)),
        ("1:16", NM(1, 16)),
    ],
)
def test_parse(text: str, granularity: Granularity) -> None:
    assert parse(text) == granularity
    assert parse(str(granularity)) == granularity
    assert parse(granularity) is granularity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unstructerd", "got 'unstructerd'; did you mean unstructured"),
        ("filters", "did you mean filter"),
        ("block:64by64", "did you mean block:64x64"),
        ("block:0", "positive integers, got 0 x 0"),
        ("4:2", "0 < n < m, got 4:2"),
        ("", "got ''$"),
        (7, "got 7$"),
    ],
    ids=str,
)
def test_parse_names_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


# Keys


@pytest.mark.parametrize("granularity", [Unstructured(), Block(2, 2), Filter()], ids=str)
def test_keys_are_the_scores_where_any_selection_is_allowed(granularity: Granularity) -> None:
    scores = torch.tensor([0.5, 0.0, 2.0])
    kept = torch.tensor([True, False, True])
    assert torch.equal(granularity.keep_keys(scores), scores)
    assert torch.equal(granularity.keep_keys(scores, kept), scores)
    assert torch.equal(granularity.grow_keys(scores, kept), scores)


def test_two_of_four_on_paper() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 1.0, 1.0, 0.0])
    keys = NM(2, 4).keep_keys(scores)
    order = keys.argsort(descending=True, stable=True).tolist()
    # First the two best of each group by score, ties to the lower index, then the others by score.
    assert order == [0, 1, 4, 5, 2, 3, 6, 7]
    assert highest(keys, 4).int().tolist() == [1, 1, 0, 0, 1, 1, 0, 0]


def test_ineligible_units_do_not_take_a_place_of_their_group() -> None:
    scores = torch.tensor([0.0, 0.0, 0.3, 0.2])
    eligible = torch.tensor([False, True, True, True])
    keys = NM(1, 2).keep_keys(scores, eligible)
    chosen = highest(torch.where(eligible, keys, -torch.inf), 2)
    assert chosen.tolist() == [False, True, True, False]


def test_growing_fills_the_groups_that_lack_most() -> None:
    kept = torch.tensor([True, True, False, False, False, True, False, False])
    growth = torch.tensor([0.0, 0.0, 9.0, 8.0, 0.1, 0.0, 0.2, 0.2])
    keys = NM(2, 4).grow_keys(growth, kept)
    order = [i for i in keys.argsort(descending=True, stable=True).tolist() if not kept[i]]
    assert order == [6, 2, 3, 7, 4]


def test_keys_of_the_two_classes_are_exact_mirror_images() -> None:
    values = [0.0, DENORMAL, 1.0, FLOAT_MAX]
    scores = torch.tensor([[FLOAT_MAX, value] for value in values]).reshape(-1)
    keys = NM(1, 2).keep_keys(scores).reshape(-1, 2)
    assert keys[:, 0].tolist() == [FLOAT_MAX] * 4
    bits = keys[:, 1].contiguous().view(torch.int32).tolist()
    magnitudes = torch.tensor(values).view(torch.int32).tolist()
    assert bits == [0x7F800000 - magnitude - 2**31 for magnitude in magnitudes]
    assert keys[0, 1] == -torch.inf
    assert keys[3, 1] == -DENORMAL


@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_no_score_lifts_the_second_class_over_the_first(value: float) -> None:
    keys = NM(1, 2).keep_keys(torch.tensor([value, value, 0.0, 0.0]))
    assert keys[1] < 0
    assert torch.equal(keys[2:], torch.tensor([0.0, -torch.inf]))


def test_negative_zero_is_zero() -> None:
    keys = NM(1, 2).keep_keys(torch.tensor([-0.0, -0.0, 0.0, 0.0]))
    assert keys.tolist() == [0.0, -torch.inf, 0.0, -torch.inf]


def test_groups_must_be_whole() -> None:
    with pytest.raises(ValueError, match=r"divisible by 4, got shape \(6,\)"):
        NM(2, 4).keep_keys(torch.zeros(6))


finite = st.floats(min_value=0, max_value=FLOAT_MAX, width=32)
awkward = st.sampled_from([0.0, DENORMAL, 2 * DENORMAL, 2.0**-126, 1.0, FLOAT_MAX])


@st.composite
def layers_in_groups(draw: st.DrawFn) -> tuple[NM, list[float]]:
    m = draw(st.integers(2, 6))
    n = draw(st.integers(1, m - 1))
    size = m * draw(st.integers(1, 8))
    return NM(n, m), draw(st.lists(finite | awkward, min_size=size, max_size=size))


@given(layers_in_groups(), st.data())
def test_any_number_of_highest_keys_respects_the_pattern(layer: tuple[NM, list[float]], data: st.DataObject) -> None:
    pattern, values = layer
    full = pattern.n * len(values) // pattern.m
    count = data.draw(st.one_of(st.just(full), st.integers(0, len(values))))
    in_groups = highest(pattern.keep_keys(torch.tensor(values)), count).reshape(-1, pattern.m).sum(1)
    if count <= full:
        assert in_groups.max() <= pattern.n
    if count >= full:
        assert in_groups.min() >= pattern.n


@given(layers_in_groups())
def test_keys_keep_the_order_of_the_scores_in_each_class(layer: tuple[NM, list[float]]) -> None:
    pattern, values = layer
    keys = pattern.keep_keys(torch.tensor(values)).tolist()
    chosen = highest(torch.tensor(keys), pattern.n * len(values) // pattern.m).tolist()
    for i, j in itertools.combinations(range(len(values)), 2):
        if chosen[i] == chosen[j]:
            assert (keys[i] < keys[j]) == (values[i] < values[j])
            assert (keys[i] == keys[j]) == (values[i] == values[j])


@given(layers_in_groups(), st.data())
def test_drop_and_grow_keeps_the_pattern(layer: tuple[NM, list[float]], data: st.DataObject) -> None:
    pattern, values = layer
    full = pattern.n * len(values) // pattern.m
    count = data.draw(st.one_of(st.just(full), st.integers(0, len(values))))
    kept = highest(pattern.keep_keys(torch.tensor(values)), count)
    exchanged = data.draw(st.integers(0, count))
    drawn = data.draw(st.permutations(kept.nonzero().flatten().tolist()))
    after_drop = kept.clone()
    after_drop[drawn[:exchanged]] = False
    growth = torch.tensor(data.draw(st.lists(finite, min_size=len(values), max_size=len(values))))
    keys = pattern.grow_keys(growth, after_drop)
    order = [i for i in keys.argsort(descending=True, stable=True).tolist() if not after_drop[i]]
    grown = after_drop.clone()
    grown[order[:exchanged]] = True
    in_groups = grown.reshape(-1, pattern.m).sum(1)
    assert grown.sum() == count
    if count <= full:
        assert in_groups.max() <= pattern.n
    if count >= full:
        assert in_groups.min() >= pattern.n


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("granularity", [Unstructured(), Block(8, 9), NM(2, 4), Filter()], ids=str)
def test_keys_have_the_same_bits_on_the_gpu(granularity: Granularity) -> None:
    weight = torch.rand(64, 16, 3, 3).round(decimals=2)
    scores = granularity.reduce(weight)
    kept = torch.rand(scores.shape) < 0.5
    assert torch.equal(granularity.keep_keys(scores.cuda()).cpu(), granularity.keep_keys(scores))
    assert torch.equal(granularity.grow_keys(scores.cuda(), kept.cuda()).cpu(), granularity.grow_keys(scores, kept))
    assert torch.equal(granularity.expand(kept.cuda(), weight.shape).cpu(), granularity.expand(kept, weight.shape))
    assert torch.allclose(granularity.reduce(weight.cuda()).cpu(), scores, rtol=2**-23, atol=0)
