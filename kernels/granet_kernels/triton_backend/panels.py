"""Panels: activations (n, features) cut into strips of one or two cache lines, as the kernels of `csr` gather them.

A panel holds so many of the n samples that a feature's values fill PANEL words of 4 bytes; its rows are the features,
so a gathered row is whole cache lines, and the panel is one piece of memory. Behind the features comes a row of zeros,
which padding may name.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64  # features of a program


def to_panels(x: Tensor, panel: int) -> Tensor:
    """x (n, features), any strides -> (panels, features + 1, panel) int32: words of x's bits, zero beyond its ends."""
    n, features = x.shape
    width = samples_of(x.dtype, panel)
    panels = x.new_empty(triton.cdiv(n, width), features + 1, panel, dtype=torch.int32)
    blocks = triton.cdiv(features + 1, _BLOCK)
    if panels.numel():
        _to_panels_kernel[(panels.shape[0] * blocks,)](
            x, panels.view(x.dtype), n, features, *x.stride(), WIDTH=width, BLOCK=_BLOCK, num_warps=4
        )
    return panels


def from_panels(panels: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """(panels, features, panel) int32 -> (n, features), contiguous."""
    _, features, panel = panels.shape
    y = panels.new_empty(n, features, dtype=dtype)
    blocks = triton.cdiv(features, _BLOCK)
    if y.numel():
        _from_panels_kernel[(panels.shape[0] * blocks,)](
            panels.view(dtype), y, n, features, WIDTH=samples_of(dtype, panel), BLOCK=_BLOCK, num_warps=4
        )
    return y


def samples_of(dtype: torch.dtype, panel: int) -> int:
    """How many samples a panel of so many words holds."""
    return panel * 4 // dtype.itemsize


@triton.jit
def _to_panels_kernel(x, panels, n, features, stride_n, stride_feature, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program a tile (WIDTH samples, BLOCK features) of a panel."""
    blocks = (features + BLOCK) // BLOCK  # of features + 1 rows
    panel = (tl.program_id(0) // blocks).to(tl.int64)
    feature = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    sample = tl.arange(0, WIDTH)
    inside = (panel * WIDTH + sample < n)[:, None] & (feature < features)[None, :]
    x += panel * WIDTH * stride_n
    places = sample[:, None].to(tl.int64) * stride_n + feature[None, :].to(tl.int64) * stride_feature
    values = tl.load(x + places, mask=inside, other=0.0)  # [WIDTH, BLOCK]
    rows = panels + panel * (features + 1) * WIDTH + feature[:, None] * WIDTH + sample[None, :]
    tl.store(rows, tl.trans(values), mask=(feature <= features)[:, None])


@triton.jit
def _from_panels_kernel(panels, y, n, features, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One program a tile (WIDTH samples, BLOCK features) of a panel."""
    blocks = (features + BLOCK - 1) // BLOCK
    panel = (tl.program_id(0) // blocks).to(tl.int64)
    feature = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    sample = tl.arange(0, WIDTH)
    rows = panels + panel * features * WIDTH + feature[:, None] * WIDTH + sample[None, :]
    values = tl.load(rows, mask=(feature < features)[:, None], other=0.0)  # [BLOCK, WIDTH]
    inside = (panel * WIDTH + sample < n)[:, None] & (feature < features)[None, :]
    y += panel * WIDTH * features
    tl.store(y + sample[:, None].to(tl.int64) * features + feature[None, :], tl.trans(values), mask=inside)
