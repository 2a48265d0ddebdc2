"""The native CPU library: found beside this file, loaded into the process of torch, its functions declared.

The library has no OpenMP runtime of its own: it calls the one that torch has brought into the process, so that both use
one pool of threads. That is why it is not linked with any, and why torch is imported before it is loaded.
"""

from __future__ import annotations

import ctypes
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

import torch

ABI_VERSION = 7

_PROCESS = os.getpid()


class Conv(ctypes.Structure):
    """granet_conv of granet_cpu.h: a convolution without groups; a linear layer has h = w = kh = kw = 1."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "in", "h", "w", "out", "kh", "kw")),
        *((name, c_int64) for name in ("stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w", "out_h", "out_w")),
    )


class Norm(ctypes.Structure):
    """granet_norm of granet_cpu.h: batch norm of n images of c channels, and whether max(., 0) follows."""

    _fields_ = (
        *((name, c_int64) for name in ("n", "c", "pixels")),
        ("eps", c_double),
        *((name, c_int) for name in ("relu", "channels_last")),
    )


_Sizes = POINTER(c_int64)
_Pointers = POINTER(c_void_p)

# Result and arguments of each function of granet_cpu.h. Tensors are passed by data_ptr(), which is an int.
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "granet_abi_version": (c_int, []),
    "granet_isa": (c_char_p, []),
    "granet_set_isa": (c_int, [c_char_p]),
    "granet_has_openmp": (c_int, []),
    "granet_tensor_new": (c_void_p, [c_int, _Sizes, _Sizes]),
    "granet_memory_release": (c_int64, []),
    "granet_layout_new": (c_void_p, [c_void_p, _Sizes, _Sizes]),
    "granet_layout_free": (None, [c_void_p]),
    "granet_layout_nnz": (c_int64, [c_void_p]),
    "granet_layout_bytes": (c_int64, [c_void_p]),
    "granet_conv2d_forward": (
        c_int,
        [c_void_p, POINTER(Conv), c_void_p, _Sizes, c_void_p, c_void_p, c_void_p, _Sizes, c_int],
    ),
    "granet_conv2d_dgrad": (
        c_int,
        [c_void_p, POINTER(Conv), c_void_p, _Sizes, c_void_p, c_void_p, _Sizes, c_int],
    ),
    "granet_conv2d_wgrad": (
        c_int,
        [c_void_p, POINTER(Conv), c_void_p, _Sizes, c_void_p, _Sizes, c_void_p, c_int],
    ),
    "granet_conv2d_backward": (
        c_int,
        [*[c_void_p, POINTER(Conv)], *[c_void_p, _Sizes] * 2, *[c_void_p, c_void_p, _Sizes, c_void_p, c_int]],
    ),
    "granet_conv2d_reads_once": (c_int, [c_void_p, POINTER(Conv), _Sizes, _Sizes, _Sizes, c_int]),
    "granet_norm_forward": (c_int, [POINTER(Norm), *[c_void_p] * 8, c_int]),
    "granet_norm_backward": (c_int, [POINTER(Norm), *[c_void_p] * 11, c_int]),
    "granet_pool_forward": (c_int, [*[c_int64] * 3, *[c_void_p] * 3, c_int]),
    "granet_pool_backward": (c_int, [*[c_int64] * 3, *[c_void_p] * 3, c_int]),
    "granet_transpose": (c_int, [*[c_int64] * 3, *[c_void_p] * 2, c_int]),
    "granet_is_zero_off": (c_int, [c_int64, c_void_p, c_void_p, c_int]),
    "granet_mask_values": (c_int, [c_int64, c_void_p, c_void_p, c_void_p, c_int]),
    "granet_topk_mask": (
        c_int,
        [c_int64, _Pointers, _Pointers, _Sizes, _Sizes, c_int, c_int, _Pointers, c_int],
    ),
}


def load() -> ctypes.CDLL | None:
    """The library with its functions declared, or None. Call it where an op would use it: it warns once if it must.

    GRANET_NATIVE=0 in the environment switches the library off without a warning; GRANET_LIBRARY names another file to
    load. Both are read once.

    Raises:
        ValueError: GRANET_NATIVE is neither 0 nor 1.
    """
    library, _ = _found()
    if library is None and _switched_on():
        _warn_once()
    return library


def unavailable() -> str | None:
    """Why there is no library, as a sentence without a full stop, or None if there is one. It never warns."""
    return _found()[1]


def isa() -> str:
    """The code that runs: "avx512", "avx2" or "portable"; "reference" without a library."""
    library, _ = _found()
    return "reference" if library is None else library.granet_isa().decode()


def digest() -> str:
    """Eight hexadecimal digits that tell one build of the library from another; "none" without a library."""
    library, _ = _found()
    return "none" if library is None else str(library.granet_digest)


def threads() -> int:
    """How many threads to use: as many as torch, but one in a forked child, where the pool's threads do not exist.

    One also if the library was built without OpenMP.
    """
    return torch.get_num_threads() if os.getpid() == _PROCESS and _has_openmp() else 1


@contextmanager
def isa_used(name: str) -> Iterator[None]:
    """Within it, the native code of this name runs, in all threads of the process.

    Raises:
        RuntimeError: there is no library.
        ValueError: no such code, or this CPU cannot run it.
    """
    library, reason = _found()
    if library is None:
        raise RuntimeError(f"isa_used: {reason}")
    before = library.granet_isa()
    if library.granet_set_isa(name.encode()) != 0:
        raise ValueError(f"isa_used: expected one of portable, avx2, avx512 that this CPU has, got {name!r}")
    try:
        yield
    finally:
        library.granet_set_isa(before)


def check(status: int) -> None:
    """Raise what the status of a native call stands for.

    Raises:
        MemoryError: 1, out of memory.
        RuntimeError: 2, a geometry that the library does not support; or any other than 0.
    """
    if status == 0:
        return
    if status == 1:
        raise MemoryError("out of memory in a native kernel")
    if status == 2:
        raise RuntimeError("the native kernel does not support this geometry")
    raise RuntimeError(f"expected status 0, 1 or 2 of a native kernel, got {status}")


@cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the reason."""
    if not _switched_on():
        return None, "GRANET_NATIVE=0 switches the native CPU library off"
    path = _path()
    if path is None:
        return None, (
            "granet was installed without its native CPU library: there was no C++17 compiler, or it failed "
            "(`pip install -v` shows how)"
        )
    try:
        return _open(path), None
    except ImportError as error:
        return None, f"the native CPU library cannot be used: {error}"


@cache
def _has_openmp() -> bool:
    library, _ = _found()
    return library is None or library.granet_has_openmp() == 1


@cache
def _switched_on() -> bool:
    value = os.environ.get("GRANET_NATIVE", "1")
    if value not in ("0", "1"):
        raise ValueError(f"GRANET_NATIVE: expected 0 or 1, got {value!r}")
    return value == "1"


@cache
def _warn_once() -> None:
    # No UserWarning: whoever turns those into errors has not asked for a run to stop where it is slow.
    warnings.warn(
        f"{unavailable()}. Sparse layers run on plain PyTorch, at dense cost; GRANET_NATIVE=0 silences this",
        RuntimeWarning,
        stacklevel=3,
    )


def _path() -> Path | None:
    named = os.environ.get("GRANET_LIBRARY")
    if named:
        return Path(named).absolute()  # dlopen looks for a bare name in the system's folders
    candidates = (Path(__file__).with_name(f"_native{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def _open(path: Path) -> ctypes.CDLL:
    """Load a library and declare its functions; ImportError unless it fits this version of granet."""
    library: Any
    try:
        _provide_openmp()
        library = ctypes.CDLL(str(path))
        library.granet_digest = f"{zlib.crc32(path.read_bytes()):08x}"
    except OSError as error:
        raise ImportError(str(error)) from None
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise ImportError(f"{path} lacks the function {name}; install granet again to build it anew")
        function.restype, function.argtypes = result, arguments
        if name == "granet_abi_version" and function() != ABI_VERSION:
            raise ImportError(
                f"{path}: expected version {ABI_VERSION}, got {function()}; install granet again to build it anew"
            )
    return cast(ctypes.CDLL, library)


def _provide_openmp() -> None:
    """See that the process has OpenMP functions for the library to call.

    torch's loader puts its own OpenMP runtime into the scope that every library is resolved in. Naming the runtime when
    linking would not do: torch's copy may bear another name, and a second copy would bring a second pool of threads.
    """
    if os.name == "posix" and not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        try:
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
        except OSError:
            return  # a library built without OpenMP needs none
