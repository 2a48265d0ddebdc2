"""The block-sparse linear kernels in Triton against float64: on a CUDA device, or interpreted in CPU memory."""

from __future__ import annotations

import pytest
import torch

from granet_kernels.reference import linear_dgrad_ref, linear_ref, linear_wgrad_ref

pytest.importorskip("triton")

from granet_kernels.triton_backend import block_linear as launchers
from granet_kernels.triton_backend import chip
from granet_kernels.triton_backend.block_index import SIZES, block_index
from granet_kernels.triton_backend.block_linear import block_linear, block_linear_dgrad, block_linear_wgrad
from granet_kernels.triton_backend.block_tilings import enough, matmul_tilings, wgrad_tilings

pytestmark = pytest.mark.usefixtures("results_of_garbage", "dots_of_bfloat16")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def block_mask(rows, columns, size, density):
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[torch.randperm(rows * columns)[: round(density * rows * columns)]] = True
    return kept.view(rows, columns).repeat_interleave(size, 0).repeat_interleave(size, 1)


def operands(n, mask, dtype, strided=False):
    """x, grad, weight and bias; off the mask the weight is NaN, which no result may show."""
    outputs, inputs = mask.shape
    x, grad = torch.randn(n, inputs), torch.randn(n, outputs)
    if strided:
        x, grad = torch.randn(n, inputs + 3)[:, 3:], torch.randn(outputs, n).t()
    weight = torch.where(mask, torch.randn(mask.shape), torch.nan)
    return [t.to(dtype) for t in (x, grad, weight, torch.randn(outputs))]


def check(device, accurate, n, mask, dtype, bias=True, strided=False, tilings=(None, None), splits=None):
    x, grad, weight, b = operands(n, mask, dtype, strided)
    wide_x, wide_grad, wide_weight, wide_b = (t.double() for t in (x, grad, weight, b))
    on_x, on_grad, on_weight, on_b, on_mask = (t.to(device) for t in (x, grad, weight, b, mask))
    if not bias:
        b = wide_b = on_b = None
    index = block_index(on_mask)
    y = block_linear(on_x, on_weight, index, on_b, tilings[0])
    accurate(y.cpu(), linear_ref(x, weight, mask, b), linear_ref(wide_x, wide_weight, mask, wide_b))
    x_grad = block_linear_dgrad(on_grad, on_weight, index, tilings[0])
    accurate(x_grad.cpu(), linear_dgrad_ref(grad, weight, mask), linear_dgrad_ref(wide_grad, wide_weight, mask))
    w_grad = block_linear_wgrad(on_grad, on_x, on_mask, index, tilings[1], splits)
    accurate(w_grad.cpu(), linear_wgrad_ref(grad, x, mask), linear_wgrad_ref(wide_grad, wide_x, mask))
    assert torch.equal(w_grad.cpu()[~mask], torch.zeros_like(mask, dtype=dtype)[~mask])
    assert w_grad.stride() == on_mask.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_as_accurate_as_torch(size, dtype, device, assert_as_accurate):
    check(device, assert_as_accurate, 100, block_mask(3, 2, size, 0.5), dtype)


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("n", [0, 1, 7, 63, 129, 300])
def test_any_number_of_rows(n, density, device, assert_as_accurate):
    check(device, assert_as_accurate, n, block_mask(5, 7, 16, density), torch.bfloat16, bias=n % 2 == 0)


@pytest.mark.parametrize("splits", [2, 5])
def test_sums_in_parts(splits, device, assert_as_accurate):
    """Of which the last may be empty."""
    check(device, assert_as_accurate, 130, block_mask(3, 9, 16, 0.4), torch.float32, splits=splits)
    check(device, assert_as_accurate, 130, block_mask(2, 3, 64, 0.4), torch.float16, splits=splits)


@pytest.mark.parametrize(("size", "dtype"), [(64, torch.float16), (16, torch.float32), (16, torch.float16)])
def test_every_tiling(size, dtype, device, assert_as_accurate):
    mask, values = block_mask(2, 6, size, 0.7), torch.empty(0, dtype=dtype, device=device)
    choices = matmul_tilings(size, values, "ieee"), wgrad_tilings(size, values, "ieee")
    assert min(map(len, choices)) > 1
    for tilings in zip(*choices, strict=True):
        check(device, assert_as_accurate, 70, mask, dtype, tilings=tilings)


def test_half_precision_without_tensor_cores(device, assert_as_accurate, monkeypatch):
    monkeypatch.setattr("granet_kernels.triton_backend.chip.capability", lambda _: (7, 0))
    for dtype in (torch.bfloat16, torch.float16):
        check(device, assert_as_accurate, 70, block_mask(2, 3, 32, 0.5), dtype)


def test_strided_operands(device, assert_as_accurate):
    check(device, assert_as_accurate, 70, block_mask(2, 3, 32, 0.5), torch.float32, strided=True)
    check(device, assert_as_accurate, 70, block_mask(2, 3, 32, 0.5).t().contiguous().t(), torch.float32)


def test_a_weight_of_exchanged_strides(device, assert_as_accurate):
    mask = block_mask(3, 2, 16, 0.5).to(device)
    x, grad, weight, _ = (t.to(device) for t in operands(40, mask.cpu(), torch.float32))
    index, turned = block_index(mask), weight.t().contiguous().t()
    assert torch.equal(block_linear(x, turned, index, None), block_linear(x, weight, index, None))
    assert torch.equal(block_linear_dgrad(grad, turned, index), block_linear_dgrad(grad, weight, index))


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)])
def test_tilings_fit_shared_memory(capability, monkeypatch):
    kib = {(7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 6): 99, (9, 0): 227, (12, 0): 99}[capability]
    monkeypatch.setattr("granet_kernels.triton_backend.chip.capability", lambda _: capability)
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
        values = torch.empty(0, dtype=dtype)
        for size in SIZES:
            for tiling in matmul_tilings(size, values, precision) + wgrad_tilings(size, values, precision):
                has_buffer_for_each = capability == (9, 0) and (dtype == torch.bfloat16 or precision == "tf32")
                steps = tiling.stages if has_buffer_for_each else tiling.stages - 1
                assert steps >= 1
                assert steps * (tiling.rows + size) * tiling.inner * values.element_size() <= kib * 1024


def test_small_layers_get_small_tiles():
    device, choices = torch.device("cpu"), matmul_tilings(64, torch.empty(0, dtype=torch.bfloat16), "ieee")
    assert enough(choices, lambda _: 1000, device) == choices[0]
    assert enough(choices, lambda tiling: 200 if tiling is choices[1] else 1, device) == choices[1]
    assert enough(choices, lambda _: 1, device).rows == min(each.rows for each in choices) < choices[0].rows


def test_a_device_that_is_not_here_is_a_modern_one():
    assert chip.capability(torch.device("cpu")) == (9, 0)


@pytest.mark.parametrize("size", SIZES)
def test_the_largest_blocks_are_found(size, device):
    mask = block_mask(4, 6, size, 0.3)
    mask[: 2 * size, : 2 * size] = torch.eye(2, dtype=torch.bool).repeat_interleave(size, 0).repeat_interleave(size, 1)
    index = block_index(mask.to(device))
    assert index.size == size
    assert index.kept == int(mask.sum()) // size**2 == index.row_counts.sum()
    for lines, of_mask in ((index.rows, mask), (index.columns, mask.t())):
        found = [t.tolist() for t in (lines.order, lines.counts, lines.blocks)]
        assert sorted(found[0]) == list(range(of_mask.shape[0] // size))
        assert found[1] == sorted(found[1], reverse=True)
        for line, count, blocks in zip(*found, strict=True):
            assert blocks[:count] == of_mask[line * size, ::size].nonzero().flatten().tolist()
            assert sorted(blocks) == list(range(of_mask.shape[1] // size))


@pytest.mark.parametrize("width", [1, 2, 8])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_groups_hold_every_kept_block_once(width, density, device):
    index = block_index(block_mask(5, 7, 16, density).repeat(1, 3).to(device))
    across = index.rows.blocks.shape[1]
    kept, counts = [], index.rows.counts.tolist()
    for place in index.groups(width).tolist():
        position, start = divmod(place, across)
        kept += [(position, slot) for slot in range(start, min(start + width, counts[position]))]
        assert start < counts[position] or start == counts[position] == 0
    assert kept == [(position, slot) for position, count in enumerate(counts) for slot in range(count)]
    assert {place // across for place in index.groups(width).tolist()} == set(range(5))


def test_masks_without_blocks(device):
    for mask in (torch.rand(64, 64) < 0.5, torch.ones(24, 16) > 0, torch.ones(0, 16) > 0, torch.ones(16, 0) > 0):
        assert block_index(mask.to(device)) is None
    assert block_index(torch.ones(256, 256, dtype=torch.bool, device=device)).size == 128
    assert block_index(torch.zeros(32, 96, dtype=torch.bool, device=device)).size == 32


def test_the_index_follows_the_mask(device):
    mask = torch.eye(2, dtype=torch.bool).repeat_interleave(16, 0).repeat_interleave(16, 1).to(device)
    index = block_index(mask)
    assert index.size == 16
    assert block_index(mask) is index
    mask.fill_(True)
    assert block_index(mask).size == 32
    mask[0, 0] = False
    assert block_index(mask) is None


def test_the_programs_of_wgrad_fill_the_device():
    device = torch.device("cpu")
    assert launchers._splits(1000, 4096, 2**14, device) == 1
    assert launchers._splits(103, 4096, 2**14, device) == 2
    assert launchers._splits(1, 4096, 2**14, device) == launchers._MOST_SPLITS
    assert launchers._splits(1, 300, 2**14, device) == 1
    assert launchers._splits(1, 0, 2**14, device) == 1
