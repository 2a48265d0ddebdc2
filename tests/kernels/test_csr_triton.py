"""Linear layers with unstructured masks in Triton against their specification: on a CUDA device, or interpreted.

Groups are small and few programs share the packing, so that a few dozen lines take every way that thousands take.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from granet_kernels.layout import layout_of
from granet_kernels.reference import linear_dgrad_ref, linear_ref, linear_wgrad_ref

pytest.importorskip("triton")

from granet_kernels.triton_backend import csr_index as index_module
from granet_kernels.triton_backend import csr_linear as launchers
from granet_kernels.triton_backend.csr_index import csr_index
from granet_kernels.triton_backend.csr_linear import csr_linear, csr_linear_dgrad, csr_linear_wgrad
from granet_kernels.triton_backend.panels import from_panels, to_panels
from granet_kernels.triton_backend.sampled_wgrad import MOST_CSR_DENSITY, prefers_tiles, sampled_linear_wgrad
from granet_kernels.triton_backend.tilings import SampledTiling, product_tilings, sampled_tilings, wgrad_tilings

pytestmark = pytest.mark.usefixtures("results_of_garbage", "dots_of_bfloat16")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 7, 63), (100, 63, 30), (300, 7, 1), (33, 1, 40)]
SMALL_TILE = SampledTiling(16, 32, 16, 4, 2)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    monkeypatch.setattr(launchers, "_CHUNKS", 2)
    monkeypatch.setattr(launchers, "_BLOCK", 256)
    monkeypatch.setattr(launchers, "_PROGRAMS", 2)
    monkeypatch.setattr(index_module, "_LANES", 32)
    monkeypatch.setattr(index_module, "group_of", lambda lines: 32)


@pytest.fixture
def check(device, assert_as_accurate):
    """A function that runs all directions and raises unless they are as accurate as torch's own, and laid out alike."""

    def run(x, weight, mask, grad, bias=None, product_tiling=None, wgrad_tiling=None, tile=SMALL_TILE):
        operands = (x, weight, mask, grad, bias)
        expected = _directions(linear_ref, linear_dgrad_ref, linear_wgrad_ref, *operands)
        wide = (t if t is None or t.dtype == torch.bool else t.double() for t in operands)
        exact = _directions(linear_ref, linear_dgrad_ref, linear_wgrad_ref, *wide)
        x, weight, mask, grad, bias = (None if t is None else t.to(device) for t in operands)
        index = csr_index(mask)
        actual = {
            "forward": csr_linear(x, weight, index, bias, product_tiling),
            "dgrad": csr_linear_dgrad(grad, weight, index, product_tiling),
            "wgrad": csr_linear_wgrad(grad, x, mask, index, wgrad_tiling),
        }
        if tile:
            actual["sampled"] = sampled_linear_wgrad(grad, x, mask, tile)
        for name, result in actual.items():
            direction = "wgrad" if name == "sampled" else name
            assert result.stride() == expected[direction].stride(), name
            assert_as_accurate(result.cpu(), expected[direction], exact[direction])
            if direction == "wgrad":
                assert not result[~mask].any(), name

    return run


def _directions(forward, dgrad, wgrad, x, weight, mask, grad, bias):
    return {
        "forward": forward(x, weight, mask, bias),
        "dgrad": dgrad(grad, weight, mask),
        "wgrad": wgrad(grad, x, mask),
    }


def operands(n, width, lines, mask, dtype=torch.float32):
    """x, weight, mask, grad, bias."""
    x, grad = torch.randn(n, width, dtype=dtype), torch.randn(n, lines, dtype=dtype)
    return x, torch.randn(lines, width, dtype=dtype), mask, grad, torch.randn(lines, dtype=dtype)


@pytest.mark.parametrize("density", [0, 0.05, 0.5, 1])
@pytest.mark.parametrize(("shape", "dtype"), list(zip(SHAPES, [*DTYPES, torch.float32], strict=True)), ids=str)
def test_all_directions(shape, dtype, density, check, random_mask):
    n, width, lines = shape
    check(*operands(n, width, lines, random_mask((lines, width), density), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tiling_computes_the_same(dtype, check, random_mask):
    given = operands(33, 20, 35, random_mask((35, 20), 0.1), dtype)
    tilings = {*wgrad_tilings(dtype, (7, 0)), *wgrad_tilings(dtype, (9, 0))}
    for number in range(max(len(tilings), len(product_tilings(dtype, (9, 0))))):
        product = product_tilings(dtype, (9, 0))[number % len(product_tilings(dtype, (9, 0)))]
        check(*given, product_tiling=product, wgrad_tiling=sorted(tilings, key=str)[number % len(tilings)], tile=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_default_tiles_of_the_sampled_gradient(dtype, device, assert_as_accurate, random_mask):
    x, _, mask, grad, _ = operands(20, 48, 32, random_mask((32, 48), 0.2), dtype)
    expected, exact = linear_wgrad_ref(grad, x, mask), linear_wgrad_ref(grad.double(), x.double(), mask)
    capabilities = [torch.cuda.get_device_capability()] if device == "cuda" else [(7, 0), (8, 0), (9, 0)]
    for capability in capabilities:
        for aligned in (True, False):
            for tile in sampled_tilings(dtype, capability, aligned):
                w_grad = sampled_linear_wgrad(grad.to(device), x.to(device), mask.to(device), tile)
                assert_as_accurate(w_grad.cpu(), expected, exact)


def test_strided_operands(check, random_mask):
    x, weight = torch.randn(50, 40).t()[::2, 3:41], torch.randn(38, 33).t()
    mask, grad = random_mask((76, 33), 0.2)[::2].t(), torch.randn(20, 66)[:, ::2]
    check(x, weight, mask, grad, torch.randn(66)[::2])


@pytest.mark.parametrize("shape", [(0, 5, 6), (4, 0, 6), (4, 5, 0)], ids=str)
def test_empty_sizes(shape, check):
    n, width, lines = shape
    check(*operands(n, width, lines, torch.ones(lines, width, dtype=torch.bool)))


def test_lines_of_very_different_length(check):
    lengths = torch.tensor([40, 0, 1, 39, *([2] * 60), 20])[torch.randperm(65)]
    mask = torch.arange(40)[None, :] < lengths[:, None]
    check(*operands(5, 40, 65, mask[:, torch.randperm(40)]))


def test_what_stands_off_the_mask_does_no_harm(check, random_mask):
    x, weight, mask, grad, bias = operands(9, 30, 40, random_mask((40, 30), 0.3))
    weight[~mask] = torch.tensor([torch.nan, torch.inf]).repeat(1000)[: int((~mask).sum())]
    check(x, weight, mask, grad, bias)


def test_an_infinite_activation_stays_where_it_is(device, random_mask):
    """Padding of a line must not multiply what others read."""
    x, weight, mask, _, _ = operands(3, 30, 40, random_mask((40, 30), 0.3))
    x[1, 0] = torch.inf
    y = csr_linear(x.to(device), weight.to(device), csr_index(mask.to(device))).cpu()
    assert torch.equal(y[1].isfinite(), ~mask[:, 0])
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("programs", [1, 3, 100])
def test_however_many_shares_a_weight_gradient_is_cut_into(programs, check, random_mask, monkeypatch):
    monkeypatch.setattr(launchers, "_PROGRAMS", programs)
    check(*operands(200, 8, 12, random_mask((12, 8), 0.9)), tile=None)


def test_results_have_the_same_bits_each_time(device, random_mask):
    x, weight, mask, grad, bias = (t.to(device) for t in operands(40, 64, 64, random_mask((64, 64), 0.3)))
    index = csr_index(mask)
    for run in (
        lambda: csr_linear(x, weight, index, bias),
        lambda: csr_linear_dgrad(grad, weight, index),
        lambda: csr_linear_wgrad(grad, x, mask, index),
        lambda: sampled_linear_wgrad(grad, x, mask, SMALL_TILE),
    ):
        assert torch.equal(run(), run())


def positions(lanes):
    """The (line, position) pairs in the lanes, in the order of the buffer without its padding."""
    found = []
    begins, order, entries = lanes.begins.tolist(), lanes.order.tolist(), lanes.entries.tolist()
    for group, (begin, end) in enumerate(pairwise(begins)):
        for slot in range(begin, end):
            line = order[group * lanes.group + (slot - begin) % lanes.group]
            if entries[slot] != lanes.width:
                found.append((line, entries[slot]))
    return found


@pytest.mark.parametrize("density", [0, 0.1, 1])
def test_index_holds_each_kept_position_once(density, device, random_mask):
    mask = random_mask((45, 70), density).to(device)
    index = csr_index(mask)
    assert index.nnz == layout_of(mask).nnz
    for lanes, matrix in ((index.rows, mask), (index.columns, mask.t())):
        found = positions(lanes)
        assert sorted(found) == [tuple(pair) for pair in matrix.nonzero().tolist()]
        for line in range(lanes.lines):
            places = [place for other, place in found if other == line]
            assert places == sorted(places)
        assert lanes.begins[-1] + 2 * lanes.group <= lanes.capacity  # the kernels read ahead


def test_index_is_kept_until_the_mask_changes(device, random_mask):
    mask = random_mask((20, 30), 0.5).to(device)
    index = csr_index(mask)
    assert csr_index(mask) is index
    assert layout_of(mask).built["csr"] is index
    assert csr_index(mask, 64).rows.group == 64
    mask[0] = ~mask[0]
    changed = csr_index(mask)
    assert changed is not index
    assert sorted(positions(changed.rows)) == [tuple(pair) for pair in mask.nonzero().tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (65, 100), (0, 3)], ids=str)
def test_panels_hold_the_bits_and_zeros(shape, dtype, device):
    x = torch.randn(shape, dtype=dtype, device=device)
    for panel in (32, 64):
        panels = to_panels(x, panel)
        assert not panels[:, -1].any()
        back = from_panels(panels[:, :-1].contiguous(), len(x), dtype)
        assert torch.equal(back, x)
        beyond = panels.view(dtype).transpose(1, 2).reshape(-1, x.shape[1] + 1)[len(x) :]
        assert not beyond.any()


def test_the_faster_weight_gradient_follows_the_density():
    for (dtype, major), most in MOST_CSR_DENSITY.items():
        assert not prefers_tiles(most / 2, dtype, (major, 0))
        assert prefers_tiles(most * 2, dtype, (major, 0))
    assert prefers_tiles(1.0, torch.bfloat16, (12, 0))


def test_arguments_that_do_not_fit(device):
    mask = torch.ones(4, 5, dtype=torch.bool, device=device)
    index, x = csr_index(mask), torch.ones(3, 5, device=device)
    with pytest.raises(ValueError, match=r"expected \(3, 5\)"):
        csr_linear(x[:, 1:], mask.float(), index)
    with pytest.raises(ValueError, match="float64"):
        csr_linear(x.double(), mask.double(), index)
    with pytest.raises(ValueError, match=r"expected \(3, 4\)"):
        csr_linear_wgrad(x, x, mask, index)
    with pytest.raises(ValueError, match="expected grad"):
        sampled_linear_wgrad(x, x, mask)
    with pytest.raises(ValueError, match="bool mask"):
        csr_index(mask.float())
