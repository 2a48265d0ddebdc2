"""Integer counts per layer: exact sums, the formulas, and ERK on a real network."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torchvision.models import resnet50

from granet.distribution import capped_uniform_counts, erdos_renyi_counts, kept_units, layer_counts

Shapes = list[tuple[int, ...]]


def sizes(shapes: Shapes) -> list[int]:
    return [math.prod(shape) for shape in shapes]


@pytest.fixture(scope="module")
def resnet50_weights() -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in resnet50().named_parameters() if p.dim() > 1}


# Hand-worked


def test_uniform_on_paper() -> None:
    # Density 13/25 of 5, 10 and 10 is 2.6, 5.2 and 5.2; rounded down they sum to 12, and the 13th goes to the .6.
    assert layer_counts("uniform", [(1, 5), (2, 5), (5, 2)], [5, 10, 10], 0.48) == [3, 5, 5]


def test_equal_remainders_go_to_the_earlier_layers() -> None:
    # Half of 3 is 1.5 in each of four layers.
    assert layer_counts("uniform", [(1, 3)] * 4, [3] * 4, 0.5) == [2, 2, 1, 1]


def test_erk_on_paper() -> None:
    # Sums of the shapes are 10 and 20 of 24 and 100 weights: eps = 62 / 30, densities 20.67 / 24 and 41.33 / 100.
    assert layer_counts("erk", [(4, 6), (10, 10)], [24, 100], 0.5) == [21, 41]


def test_erk_with_a_layer_that_would_exceed_one() -> None:
    # eps = 77 / 25 gives 15.4 of the first 6 weights: it becomes dense, and eps = 71 / 20 for the second.
    assert layer_counts("erk", [(2, 3), (10, 10)], [6, 100], 0.27) == [6, 71]


def test_erk_solves_again_until_no_layer_exceeds_one() -> None:
    # 16 of 21 weights. eps = 16 / 16 gives the first layer 2 of 1 and the second exactly 4 of 4; with the first dense,
    # eps = 15 / 14 gives the second 4.3 of 4; with both dense, 11 are left for the third.
    shapes: Shapes = [(1, 1), (2, 2), (2, 8)]
    assert layer_counts("erk", shapes, sizes(shapes), 5 / 21) == [1, 4, 11]


def test_er_and_erk_differ_by_the_kernel() -> None:
    shapes: Shapes = [(8, 8, 3, 3), (8, 8, 1, 1), (20, 40)]
    # 144 of 1440. ER: densities as 16/64, 16/64 and 60/800, so counts as 144 : 16 : 60.
    assert layer_counts("er", shapes, sizes(shapes), 0.9) == [94, 11, 39]
    # ERK: counts as 22 : 18 : 60.
    assert layer_counts("erk", shapes, sizes(shapes), 0.9) == [32, 26, 86]


def test_er_is_erk_for_linear_layers() -> None:
    shapes: Shapes = [(300, 784), (100, 300), (10, 100)]
    assert layer_counts("er", shapes, sizes(shapes), 0.9) == layer_counts("erk", shapes, sizes(shapes), 0.9)


def test_densities_of_the_shapes_apply_to_the_units() -> None:
    shapes: Shapes = [(64, 64), (64, 256)]
    # 128/4096 and 320/16384 are as 8 : 5; in 16 and 64 units of 16 x 16, counts are as 128 : 320.
    assert layer_counts("erk", shapes, [16, 64], 0.5) == [11, 29]


def test_dense_keeps_everything() -> None:
    shapes: Shapes = [(2, 3), (7, 5, 3, 3)]
    for name in ("uniform", "er", "erk"):
        assert layer_counts(name, shapes, sizes(shapes), 0) == sizes(shapes)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 10), (1, 3)], ids=lambda p: f"{p[0]}:{p[1]}")
def test_uniform_counts_of_a_pattern_are_whole(pattern: tuple[int, int]) -> None:
    n, m = pattern
    units = [m * groups for groups in (7, 63, 100)]
    assert layer_counts("uniform", [(1, u) for u in units], units, 1 - n / m) == [u // m * n for u in units]


# ResNet-50


def test_erk_of_resnet50_at_90_percent(resnet50_weights: dict[str, tuple[int, ...]]) -> None:
    shapes = list(resnet50_weights.values())
    units = sizes(shapes)
    counts = layer_counts("erk", shapes, units, 0.9)
    assert sum(units) == 25_502_912
    assert sum(counts) == 2_550_291
    dense = [name for name, count, n in zip(resnet50_weights, counts, units, strict=True) if count == n]
    assert dense == ["layer1.0.conv1.weight"]
    # The formula in floating point: one dense layer, epsilon for the rest.
    first = list(resnet50_weights).index("layer1.0.conv1.weight")
    others = [sum(shape) for i, shape in enumerate(shapes) if i != first]
    epsilon = (2_550_291 - units[first]) / sum(others)
    for i, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
        if i != first:
            assert abs(count - epsilon * sum(shape)) < 1


# Invariants


@st.composite
def networks(draw: st.DrawFn) -> tuple[Shapes, list[int]]:
    shape = st.one_of(st.tuples(*[st.integers(1, 40)] * 2), st.tuples(*[st.integers(1, 12)] * 4))
    shapes = draw(st.lists(shape, min_size=1, max_size=8))
    if draw(st.booleans()):
        return shapes, sizes(shapes)
    return shapes, [shape[0] for shape in shapes]


@example(([(90, 1)], [90]), "uniform", 0.65)
@given(networks(), st.sampled_from(["uniform", "er", "erk"]), st.floats(0, 0.999))
def test_counts_are_exact_and_within_their_layers(
    network: tuple[Shapes, list[int]], name: str, sparsity: float
) -> None:
    shapes, units = network
    # In decimals, as the sparsity is written: in floats (1 - .65) * 90 is 31.499999999999996.
    total = int(((1 - Decimal(repr(sparsity))) * sum(units)).to_integral_value(ROUND_HALF_EVEN))
    if total == 0:
        with pytest.raises(ValueError, match="keeps one unit or more"):
            layer_counts(name, shapes, units, sparsity)
        return
    counts = layer_counts(name, shapes, units, sparsity)
    assert sum(counts) == total
    assert all(0 <= count <= n for count, n in zip(counts, units, strict=True))


@given(networks(), st.floats(0, 0.9))
def test_erk_densities_are_proportional_below_one(network: tuple[Shapes, list[int]], sparsity: float) -> None:
    shapes, units = network
    counts = layer_counts("erk", shapes, units, sparsity) if kept_units(sum(units), sparsity) else [0] * len(units)
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    epsilons = [(count / n / r, 1 / n / r) for count, n, r in zip(counts, units, raw, strict=True)]
    # A layer that is not dense has the epsilon of all, a dense one no more than that; up to the rounding of one unit.
    for (epsilon, unit), count, n in zip(epsilons, counts, units, strict=True):
        if count < n:
            assert all(epsilon + unit >= other - other_unit - 1e-9 for other, other_unit in epsilons)


# Other forms


def test_original_form_of_set() -> None:
    # 20 * (784 + 300) = 21680, 20 * 400 = 8000; the last layer would have 2200 of 1000.
    assert erdos_renyi_counts([(300, 784), (100, 300), (10, 100)], [235200, 30000, 1000], 20) == [21680, 8000, 1000]
    assert erdos_renyi_counts([(8, 8, 3, 3)], [576], 1.5) == [216]


def test_capped_uniform() -> None:
    assert capped_uniform_counts([100, 1000, 50], 0.9, [0, 1, 0.8]) == [100, 100, 10]
    assert capped_uniform_counts([100, 1000, 50], 0.5, [0, 1, 0.8]) == [100, 500, 25]


# Errors


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, math.nan, math.inf], ids=str)
def test_sparsity_out_of_range(sparsity: float) -> None:
    for call in (
        lambda: kept_units(10, sparsity),
        lambda: layer_counts("erk", [(2, 5)], [10], sparsity),
        lambda: capped_uniform_counts([10], sparsity, [1]),
    ):
        with pytest.raises(ValueError, match=r"sparsity in \[0, 1\), got"):
            call()


@pytest.mark.parametrize(
    ("name", "shapes", "units", "sparsity", "message"),
    [
        ("unifrom", [(2, 5)], [10], 0.5, "got 'unifrom'; did you mean uniform"),
        ("global", [(2, 5)], [10], 0.5, "expected a distribution of uniform, er, erk, got 'global'"),
        ("erk", [], [], 0.5, "one or more layers, got 0 for 0"),
        ("erk", [(2, 5)], [10, 10], 0.5, "got 2 for 1"),
        ("uniform", [(2, 5)], [0], 0.5, r"one unit or more, got \[0\]"),
        ("uniform", [(2, 0)], [1], 0.5, r"non-empty dimensions, got shape \(2, 0\)"),
        ("erk", [(5,)], [5], 0.5, r"non-empty dimensions, got shape \(5,\)"),
        ("erk", [(2, 5)], [10], 0.99, "keeps one unit or more, got 0.99 of 10 units"),
    ],
)
def test_bad_layers(name: str, shapes: Shapes, units: list[int], sparsity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_counts(name, shapes, units, sparsity)


def test_bad_epsilon_and_caps() -> None:
    for epsilon in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive epsilon"):
            erdos_renyi_counts([(2, 5)], [10], epsilon)
    with pytest.raises(ValueError, match=r"caps in \[0, 1\], got \[1.1\]"):
        capped_uniform_counts([10], 0.5, [1.1])
    with pytest.raises(ValueError, match="got 1 for 2"):
        capped_uniform_counts([10], 0.5, [1, 1])
