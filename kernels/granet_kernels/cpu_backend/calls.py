"""What of a call depends on shapes and strides alone, worked out once: geometry, result, and the site in the plan."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from granet_kernels import plan
from granet_kernels.cpu_backend import library
from granet_kernels.layout import four
from granet_kernels.reference import image_format, is_channels_last

_MOST_POSITIONS = 2**31 - 16  # of a mask: the library counts in 32 bits, and a little ahead
_MOST_CALLS = 4096
_LEAST_CHANNELS = 16
_LARGE = 1 << 22  # floats
# Native up to it by the rule. On Intel's CPUs linear layers break even at densities of .3 to .4. AMD's would win at .5
# already, which a measured plan finds out: the rule is not to lose anywhere.
_LINEAR_RULE_DENSITY = 0.3

Pair = Sequence[int]


@dataclass(slots=True)
class Call:
    """One direction on operands of given shapes and strides, ready for the library.

    Attributes:
        site: of the plan.
        direction: "forward", "dgrad" or "wgrad".
        conv: reference to the library's geometry.
        first, second: strides of the two images: input and output, gradient and input gradient, gradient and input.
        shape, strides: of the result; unused for wgrad, whose result is as the mask.
        fits: whether the weight has the mask's strides.
        partners: sites of the other directions, of a forward pass whose gradient comes back in the strides of its
            result.
        supported: whether the library takes this geometry, as far as is known.
        is_nchw: whether all operands are images of several pixels and channels, or weights of such, in NCHW.
        is_large: whether input and output are larger than a cache.
    """

    site: plan.Site
    direction: str
    conv: Any
    first: Any
    second: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    fits: bool
    threads: int
    partners: dict[str, plan.Site]
    is_nchw: bool
    is_large: bool
    supported: bool = True


_calls: dict[Hashable, Call | None] = {}
_gradients: dict[Hashable, tuple[Call, Call] | None] = {}


def find_call(
    op: str,
    direction: str,
    first: Tensor,
    second: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    x_shape: Sequence[int] = (),
) -> Call | None:
    """The call for these operands, or None if it is not for the library."""
    threads = library.threads()
    key = (
        *(direction, threads, first.dtype, second.dtype, mask.dtype, groups, *stride, *padding, *dilation, *x_shape),
        *(first.shape, first.stride(), second.shape, second.stride(), mask.shape, mask.stride()),
        None if bias is None else (bias.shape, bias.dtype),
    )
    try:
        call = _calls[key]
    except KeyError:
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
            _gradients.clear()  # they are the same calls
        geometry = (tuple(stride), tuple(padding), tuple(dilation))
        prepare = _prepare if groups == 1 and _is_for_library(first, second, mask, bias) else None
        call = prepare(op, direction, first, second, mask, geometry, x_shape, threads) if prepare else None
        _calls[key] = call
    return call if call is not None and call.supported else None


def find_gradients(
    op: str,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> tuple[Call, Call] | None:
    """The calls of dgrad and wgrad, or None if one of them is not for the library."""
    key = (
        *(library.threads(), grad.dtype, x.dtype, weight.dtype, mask.dtype, groups, *stride, *padding, *dilation),
        *(grad.shape, grad.stride(), x.shape, x.stride(), weight.shape, weight.stride(), mask.shape, mask.stride()),
    )
    try:
        calls = _gradients[key]
    except KeyError:
        if len(_gradients) >= _MOST_CALLS:
            _gradients.clear()
        geometry = stride, padding, dilation, groups
        dgrad = find_call(op, "dgrad", grad, weight, mask, None, *geometry, x.shape if op == "conv2d" else ())
        wgrad = find_call(op, "wgrad", grad, x, mask, None, *geometry)
        calls = _gradients[key] = None if dgrad is None or wgrad is None else (dgrad, wgrad)
    return calls if calls is not None and calls[0].supported and calls[1].supported else None


def _is_for_library(first: Tensor, second: Tensor, mask: Tensor, bias: Tensor | None) -> bool:
    """Whether dtypes, dimensions and the mask are what the library takes."""
    return (
        library.load() is not None
        and first.dtype == second.dtype == torch.float32
        and mask.dtype == torch.bool
        and first.dim() == second.dim() == mask.dim()
        and 0 not in (first.numel(), second.numel(), mask.numel())
        and mask.numel() <= _MOST_POSITIONS
        and torch.empty_like(mask, device="meta").stride() == mask.stride()  # the gradient lies as the mask does
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == mask.shape[:1]))
    )


def _prepare(
    op: str,
    direction: str,
    first: Tensor,
    second: Tensor,
    mask: Tensor,
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    x_shape: Sequence[int],
    threads: int,
) -> Call | None:
    """A new Call, or None if the shapes do not belong together: torch's own operations know what to say then."""
    out, channels, *kernel = four(mask.shape, 1)
    if direction == "forward":
        x_sizes = four(first.shape, 1)
    elif direction == "wgrad":
        x_sizes = four(second.shape, 1)
    else:
        x_sizes = four(x_shape or (first.shape[0], channels), 1)
    n, _, *pixels = x_sizes
    size = [
        (pixels[i] + 2 * geometry[1][i] - geometry[2][i] * (kernel[i] - 1) - 1) // geometry[0][i] + 1 for i in (0, 1)
    ]
    y_sizes = (n, out, *size)
    agree = x_sizes[1] == channels and min(x_sizes) > 0 and min(size) > 0
    if direction != "forward":
        agree = agree and four(first.shape, 1) == y_sizes
    if direction != "wgrad":
        agree = agree and second.shape == mask.shape
    if not agree:
        return None
    conv = library.Conv(*x_sizes, out, *kernel, *geometry[0], *geometry[1], *geometry[2], *size)
    shape = (y_sizes if direction == "forward" else x_sizes)[: mask.dim()]
    layout = image_format(first, second) if op == "conv2d" else torch.contiguous_format
    image = torch.empty(shape, memory_format=layout, device="meta")
    result = image.stride() if direction != "wgrad" else second.stride()

    def site(direction: str, *operands: Tensor) -> plan.Site:
        key = _site_key(op, direction, x_sizes, mask, geometry, operands, threads)
        return plan.site(key, _LINEAR_RULE_DENSITY if op == "linear" else plan.RULE_DENSITY)

    is_forward = direction == "forward"
    return Call(
        site=site(direction, first, second),
        direction=direction,
        conv=conv,
        first=_int64s(four(first.stride(), 0)),
        second=_int64s(four(result, 0)),
        shape=shape,
        strides=image.stride(),
        fits=direction == "wgrad" or _same_strides(second, mask),
        threads=threads,
        is_nchw=_is_nchw(layout, x_sizes, y_sizes, first, second, mask),
        is_large=math.prod(x_sizes) + math.prod(y_sizes) >= _LARGE,
        partners={"dgrad": site("dgrad", image, second), "wgrad": site("wgrad", image, first)} if is_forward else {},
    )


def _is_nchw(layout: torch.memory_format, x_sizes: Sequence[int], y_sizes: Sequence[int], *operands: Tensor) -> bool:
    few = min(x_sizes[1], y_sizes[1]) < _LEAST_CHANNELS or x_sizes[2] * x_sizes[3] == 1
    return layout == torch.contiguous_format and not few and all(t.dim() == 4 and t.is_contiguous() for t in operands)


def _site_key(
    op: str,
    direction: str,
    x_sizes: Sequence[int],
    mask: Tensor,
    geometry: tuple[tuple[int, ...], ...],
    operands: tuple[Tensor, ...],
    threads: int,
) -> str:
    """The name of a site, e.g. "conv2d forward 128x64x32x32 * 64x64x3x3, 1x1 1x1 1x1, nhwc nchw nchw, 2 threads"."""
    sizes = f"{_sizes(x_sizes[: mask.dim()])} * {_sizes(mask.shape)}"
    numbers = f", {' '.join(map(_sizes, geometry))}" if op == "conv2d" else ""
    formats = " ".join(map(_format, (*operands, mask)))
    return f"{op} {direction} {sizes}{numbers}, {formats}, {threads} threads"


def _sizes(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def _format(tensor: Tensor) -> str:
    if tensor.dim() == 4 and is_channels_last(tensor):
        return "nhwc"
    return "nchw" if tensor.is_contiguous() else "strided"


def _same_strides(weight: Tensor, mask: Tensor) -> bool:
    """Whether both lie alike; how far apart the elements of a dimension of size 1 would be does not matter."""
    steps = zip(mask.shape, weight.stride(), mask.stride(), strict=True)
    return all(size == 1 or own == theirs for size, own, theirs in steps)


def _int64s(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * 4)(*values)
