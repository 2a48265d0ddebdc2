"""Layouts are found by the mask's memory, follow its changes, and go with it."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import threading
import weakref

import pytest
import torch

import granet_kernels
from granet_kernels import plan
from granet_kernels.cpu_backend import library
from granet_kernels.layout import (
    EMPTY_BUCKET,
    bucket_of,
    density_of,
    known_layout,
    layout_of,
    through_dispatcher,
    trust_version,
)

needs_library = pytest.mark.skipif(library.unavailable() is not None, reason="no native library")


def kept_natively(layout):
    return library.load().granet_layout_nnz(layout.native)


@pytest.mark.parametrize("density", [0, 0.05, 0.5, 1])
def test_counts(density, random_mask):
    layout = layout_of(random_mask((10, 4, 3, 3), density))
    assert (layout.nnz, layout.numel) == (round(360 * density), 360)
    assert layout.density == layout.nnz / 360
    assert layout.bucket == bucket_of(layout.density)


def test_a_mask_without_positions():
    layout = layout_of(torch.ones(0, 3, dtype=torch.bool))
    assert (layout.nnz, layout.density, layout.bucket) == (0, 0.0, EMPTY_BUCKET)


def test_buckets_are_on_a_logarithmic_scale():
    assert [bucket_of(density) for density in (1, 0.5, 0.25, 0)] == [0, 6, 12, EMPTY_BUCKET]
    assert bucket_of(2**-31) < EMPTY_BUCKET
    assert [bucket_of(density_of(bucket)) for bucket in (0, 1, 17, 60, EMPTY_BUCKET)] == [0, 1, 17, 60, EMPTY_BUCKET]


def test_found_again_until_the_mask_is_changed_in_place(random_mask):
    mask = random_mask((6, 5), 0.5)
    layout = layout_of(mask)
    assert layout_of(mask) is layout
    assert layout_of(mask.detach()) is layout
    assert layout_of(mask.view(6, 5)) is layout
    mask[0] = True
    assert layout_of(mask) is not layout
    assert layout_of(mask).nnz == int(mask.sum())
    with torch.inference_mode():
        mask.fill_(True)
    assert layout_of(mask).nnz == 30


def changed_uncounted(mask):
    """The mask, with its first rows swapped by somebody whom autograd does not know."""
    version, values = mask._version, mask.numpy()
    values[[0, 1]] = values[[1, 0]]
    assert mask._version == version
    return mask


def test_the_dispatcher_trusts_nobody(random_mask):
    mask, x, weight = random_mask((6, 50), 0.5), torch.randn(4, 50), torch.randn(6, 50)
    with plan.use("native"):
        for _ in range(2):
            y = torch.ops.granet.linear(x, weight, changed_uncounted(mask), None, None)
            torch.testing.assert_close(y, x @ (weight * mask).t())
            y = granet_kernels.linear(x, weight, changed_uncounted(mask))  # compared with what the dispatcher saw
            torch.testing.assert_close(y, x @ (weight * mask).t())


def test_outside_of_the_dispatcher_a_mask_is_compared_once(random_mask, monkeypatch):
    mask = random_mask((6, 50), 0.5)
    with through_dispatcher():
        layout = layout_of(mask)
    assert layout_of(mask) is layout
    with monkeypatch.context() as patch:
        patch.setattr(torch, "equal", None)
        assert layout_of(mask) is layout
    with through_dispatcher():
        assert layout_of(mask) is layout
        assert layout_of(changed_uncounted(mask)) is not layout
    layout = layout_of(mask)
    mask[0] = True
    assert layout_of(mask) is not layout


def test_a_trusted_mask_is_not_compared(random_mask, monkeypatch):
    mask = random_mask((6, 50), 0.5)
    trust_version(mask)
    monkeypatch.setattr(torch, "equal", None)
    with through_dispatcher():
        layout = layout_of(mask)
        assert layout_of(mask.detach()) is layout
        mask[0] = True
        assert layout_of(mask) is not layout


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler for inductor")
def test_compiled_code_uses_memory_again():
    """The second mask takes the place of the first, which is dead by then, and no counter tells."""

    def network(x, first, second):
        return granet_kernels.linear(granet_kernels.linear(x, first, first > 0), second, second > 0)

    x, *weights = torch.randn(40, 64), torch.randn(64, 64), torch.randn(64, 64)
    with torch.no_grad(), plan.use("native"):
        expected = network(x, *weights)
        y = torch.compile(network, fullgraph=True)(x, *weights)
    torch.testing.assert_close(y, expected)


def test_views_have_layouts_of_their_own(random_mask):
    mask = random_mask((6, 5), 0.5)
    views = [mask, mask[2:], mask.t(), mask[:, ::2], mask.reshape(5, 6)]
    assert [layout_of(view).nnz for view in views] == [int(view.sum()) for view in views]
    assert len({id(layout_of(view)) for view in views}) == len(views)
    mask.zero_()
    assert [layout_of(view).nnz for view in views] == [0] * len(views)


def test_copies_have_layouts_of_their_own(random_mask):
    mask = random_mask((6, 5), 0.5)
    layout = layout_of(mask)
    copies = [mask.clone(), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.to(torch.uint8).bool()]
    for other in copies:
        assert layout_of(other) is not layout
        other.fill_(True)
        assert layout_of(other).nnz == 30
    assert layout_of(mask).nnz == layout.nnz == 15


def test_masks_made_under_inference_mode_are_compared():
    with torch.inference_mode():
        mask = torch.zeros(4, 5, dtype=torch.bool)
        layout = layout_of(mask)
        assert layout_of(mask) is layout
        mask[1] = True  # no version counter counts this
        assert layout_of(mask).nnz == 5
    assert layout_of(mask).nnz == 5


def test_of_many_views_only_some_are_remembered():
    mask = torch.ones(5000, dtype=torch.bool)
    for i in range(3000):
        layout_of(mask[i : i + 2])
    assert len(mask.untyped_storage().__dict__["_granet_layouts"]) <= 1024


def test_freed_with_the_mask(random_mask):
    mask = random_mask((6, 5), 0.5)
    view = mask[1:]
    layouts = [weakref.ref(layout_of(mask)), weakref.ref(layout_of(view))]
    del mask
    gc.collect()
    assert all(layout() is not None for layout in layouts)
    assert layout_of(view) is layouts[1]()
    del view
    gc.collect()
    assert [layout() for layout in layouts] == [None, None]


def test_a_change_frees_the_old_layout(random_mask):
    mask = random_mask((6, 5), 0.5)
    old = weakref.ref(layout_of(mask))
    mask.zero_()
    layout_of(mask)
    gc.collect()
    assert old() is None


@needs_library
def test_every_native_index_is_freed(random_mask, monkeypatch):
    real, made, freed = library.load(), [], []

    class Counting:
        @staticmethod
        def granet_layout_new(*arguments):
            made.append(real.granet_layout_new(*arguments))
            return made[-1]

        @staticmethod
        def granet_layout_free(handle):
            freed.append(handle)
            real.granet_layout_free(handle)

    monkeypatch.setattr(library, "load", Counting)
    mask = random_mask((6, 5), 0.5)
    for _ in range(5):
        assert layout_of(mask).native == layout_of(mask).native
        mask[0, 0] ^= True
    del mask
    gc.collect()
    assert len(made) == 5
    assert sorted(freed) == sorted(made)


@needs_library
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 2)], ids=["linear", "conv"])
def test_the_native_index_is_of_the_masks_own_place(shape, random_mask):
    mask = random_mask(shape, 0.5)
    for view in (mask, mask[1:, ::2], mask.transpose(0, 1)):
        assert kept_natively(layout_of(view)) == int(view.sum())


@needs_library
def test_a_freed_mask_has_no_native_index(random_mask):
    mask = random_mask((6, 5), 0.5)
    layout = layout_of(mask)
    del mask
    gc.collect()
    with pytest.raises(RuntimeError, match="no living mask"):
        layout.native  # noqa: B018


@needs_library
def test_many_threads(random_mask):
    mask, weight, x = random_mask((40, 30), 0.5), torch.randn(40, 30), torch.randn(8, 30)
    expected, failures = x @ (weight * mask).t(), []

    def work():
        for _ in range(50):
            mask.logical_or_(mask)  # no change, but the version goes up: the others find an outdated layout
            if not torch.allclose(granet_kernels.linear(x, weight, mask), expected, atol=1e-5):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_library
def test_compiled_code_finds_the_layout_of_the_mask(random_mask, compiled_once):
    mask = random_mask((6, 5), 0.5)
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    compiled = compiled_once(lambda x, weight, mask: granet_kernels.linear(x, weight, mask).square().sum())
    with plan.use("native"):
        layouts = []
        for _ in range(3):
            compiled(x, weight, mask).backward()
            layouts.append(known_layout(mask))
            assert set(plan.report(mask)) == {"forward", "dgrad", "wgrad"}
        assert layouts[0] is not None
        assert layouts[0] is layouts[1] is layouts[2]
        mask.copy_(~mask)
        compiled(x, weight, mask).backward()
        assert known_layout(mask) is not layouts[0]
