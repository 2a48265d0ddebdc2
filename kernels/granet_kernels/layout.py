"""SparseLayout: what a kernel needs to know of one mask, kept with the mask's memory and rebuilt when it has changed.

Ops get a mask as a plain tensor. Its layouts hang on its storage, so every alias of the mask (a view, a saved tensor,
an input of compiled code) finds them, and they are freed with it.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from granet_kernels.cpu_backend import library

_ATTRIBUTE = "_granet_layouts"
_TRUSTED = "_granet_counts_changes"  # of a storage: see trust_version
_thread = threading.local()
_MOST_LAYOUTS = 1024  # of one storage: somebody may walk over a large buffer in views

BUCKETS_PER_OCTAVE = 6
EMPTY_BUCKET = 200  # of a mask that keeps nothing; 2^31 positions with one kept are in bucket 186


class SparseLayout:
    """One mask as it was when `layout_of` saw it.

    Attributes:
        nnz, numel: how many positions are kept, and how many there are.
        density: nnz / numel; 0 for a mask without positions.
        bucket: the density on a logarithmic scale, from 0 (dense); each step is a factor of 2^(1/6).
        built: what backends made of this mask, by their own names, e.g. the kept blocks; gone when the mask changes.
        last: the plan's notes by direction, what ran last with this mask; they outlive a change of the mask.
        seen: the plan's notes, where this layout has run natively and so is warm.
        settled: what is remembered of the last call with this mask, see settled.py; None if nothing is.
    """

    __slots__ = (
        "__weakref__",
        "_copy",
        "_handle",
        "_is_counted",
        "_place",
        "_version",
        "bucket",
        "built",
        "density",
        "last",
        "nnz",
        "numel",
        "seen",
        "settled",
    )

    def __init__(self, mask: Tensor, last: dict[str, Any]) -> None:
        self._version = _version(mask)
        # Where nobody counts the changes it is compared with what it was.
        self._is_counted = self._version is not None and _counts_changes(mask)
        self._copy = None if self._is_counted else mask.clone()
        self._place = (weakref.ref(mask.untyped_storage()), mask.storage_offset(), tuple(mask.shape), mask.stride())
        self._handle: int | None = None
        self.numel = mask.numel()
        self.nnz = int(mask.count_nonzero())
        self.density = self.nnz / self.numel if self.numel else 0.0
        self.bucket = bucket_of(self.density)
        self.built: dict[str, Any] = {}
        self.last = last
        self.seen: set[Any] = set()
        self.settled: Any = None

    @property
    def native(self) -> int:
        """The address of the granet_layout, built at the first use, while the mask is as it was.

        Raises:
            RuntimeError: no native library, a mask that is freed, or one that is not on the cpu with 2 or 4 dimensions.
            MemoryError: the index cannot be held.
        """
        return self._handle if self._handle is not None else self._build()

    @property
    def has_native(self) -> bool:
        """Whether the granet_layout is built."""
        return self._handle is not None

    def is_of(self, mask: Tensor) -> bool:
        """Whether the mask is still what this layout describes. The place in memory is the caller's to compare."""
        version = _version(mask)
        if (version is None) != (self._version is None):
            return False
        counts = version is not None and _counts_changes(mask)
        if counts and self._is_counted:
            return version == self._version
        if self._copy is None or not torch.equal(self._copy, mask):
            return False
        if counts:  # compared once, and counted from now on
            self._version, self._is_counted = version, True
        return True

    def _build(self) -> int:
        lib = library.load()
        reference, offset, shape, strides = self._place
        storage = reference()
        if lib is None or storage is None or storage.device.type != "cpu" or len(shape) not in (2, 4):
            reason = "no native library" if lib is None else "no living mask on the cpu with 2 or 4 dimensions"
            raise RuntimeError(f"SparseLayout.native: {reason}")
        sizes, steps = _int64s(four(shape, 1)), _int64s(four(strides, 0))
        handle = lib.granet_layout_new(storage.data_ptr() + offset, sizes, steps)
        if not handle:
            raise MemoryError(f"no memory for the index of a mask of shape {shape}")
        # Should two threads build at once, both results are good, and each is freed by its own finalizer.
        weakref.finalize(self, lib.granet_layout_free, handle).atexit = False
        self._handle = handle
        return int(handle)


def layout_of(mask: Tensor) -> SparseLayout:
    """The layout of a mask, built anew if the mask was changed in place since the last call.

    Changes are seen through the version counter that autograd keeps, so not those by way of `mask.data` or numpy. Where
    nobody counts, the bytes are compared: of inference tensors, and of masks that reach an op through torch's
    dispatcher, unless `trust_version` was told of them.

    Args:
        mask: bool, True = kept.
    """
    layouts = _layouts_at(mask)
    key = (mask.storage_offset(), mask.shape, mask.stride())
    layout = layouts.get(key)
    if layout is not None and layout.is_of(mask):
        return layout
    if len(layouts) >= _MOST_LAYOUTS:
        layouts.clear()
    layout = layouts[key] = SparseLayout(mask, {} if layout is None else layout.last)
    return layout


def trust_version(mask: Tensor) -> None:
    """Promise that all who write to the mask's memory count it as a change of the mask.

    The memory of a tensor that compiled code makes is used for others after it, and no counter tells. So a mask that an
    op gets through the dispatcher might be of that kind, and is compared; one that outlives calls need not be.
    """
    if type(mask) is Tensor:
        mask.untyped_storage().__dict__[_TRUSTED] = True


@contextmanager
def through_dispatcher() -> Iterator[None]:
    """Within it, in this thread, masks may be of compiled code."""
    before = getattr(_thread, "dispatched", False)
    _thread.dispatched = True
    try:
        yield
    finally:
        _thread.dispatched = before


def _counts_changes(mask: Tensor) -> bool:
    return not getattr(_thread, "dispatched", False) or _TRUSTED in mask.untyped_storage().__dict__


def known_layout(mask: Tensor) -> SparseLayout | None:
    """The layout that `layout_of` returned last for this mask, though the mask may have changed; None if none."""
    return _layouts_at(mask).get((mask.storage_offset(), mask.shape, mask.stride()))


def bucket_of(density: float) -> int:
    """The bucket of a density: 0 for 1, more for less."""
    return EMPTY_BUCKET if density <= 0 else round(-BUCKETS_PER_OCTAVE * math.log2(density))


def density_of(bucket: int) -> float:
    """The density in the middle of a bucket."""
    return 0.0 if bucket >= EMPTY_BUCKET else 2 ** (-bucket / BUCKETS_PER_OCTAVE)


def four(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """Sizes or strides of two or four dimensions as those of four: a linear layer is a convolution of 1 x 1."""
    return (*values, *[fill] * (4 - len(values)))


def _layouts_at(mask: Tensor) -> dict[Any, SparseLayout]:
    # torch keeps the Python object of a storage for as long as the storage lives, so what is hung on it stays. (Up to
    # 2.6 it is emptied if the collector finds it in a cycle, as pickling leaves one: then a layout is built once more.)
    # setdefault is atomic: threads need no lock, and a forked child inherits none.
    layouts: dict[Any, SparseLayout] = mask.untyped_storage().__dict__.setdefault(_ATTRIBUTE, {})
    return layouts


def _version(mask: Tensor) -> int | None:
    return None if mask.is_inference() else mask._version


def _int64s(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)
