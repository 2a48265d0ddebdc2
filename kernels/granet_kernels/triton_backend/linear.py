"""The linear ops on a CUDA device: what the plan chooses, Triton kernels or torch's dense operations.

A mask of whole square blocks goes to the block-sparse kernels, any other to those of single weights. Both take float32,
bfloat16 and float16; everything else is computed densely.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from granet_kernels import plan
from granet_kernels.layout import layout_of
from granet_kernels.reference import linear_dgrad_ref, linear_ref, linear_wgrad_ref
from granet_kernels.triton_backend import chip, device_clock
from granet_kernels.triton_backend.block_index import BlockIndex, block_index
from granet_kernels.triton_backend.block_linear import block_linear, block_linear_dgrad, block_linear_wgrad
from granet_kernels.triton_backend.csr_index import csr_index
from granet_kernels.triton_backend.csr_linear import csr_linear, csr_linear_dgrad, csr_linear_wgrad
from granet_kernels.triton_backend.sampled_wgrad import prefers_tiles, sampled_linear_wgrad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RULE_DENSITY = {
    "block 128": 0.8,
    "block 64": 0.6,
    "block 32": 0.4,
    "block 16": 0.15,
    "single": 0.18,
    "single, 16": 0.025,
}
"""Up to which density the rule takes the kernels: what rooflines of an H200 say, not measured. "single" is of float32
beside IEEE products, "single, 16" beside those of the tensor cores."""

_MOST_SITES = 4096
_sites: dict[Hashable, plan.Site] = {}


def linear_triton(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, dense_wgrad: Tensor | None) -> Tensor:
    """reference.linear_ref."""

    def sparse(index: BlockIndex | None) -> Tensor:
        if index is None:
            return csr_linear(x, weight, csr_index(mask), bias)
        return block_linear(x, weight, index, bias)

    def dense(full: bool) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias) if full else linear_ref(x, weight, mask, bias)

    return _run("forward", x, mask, sparse, dense)


def linear_dgrad_triton(grad: Tensor, weight: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    """reference.linear_dgrad_ref."""

    def sparse(index: BlockIndex | None) -> Tensor:
        if index is None:
            return csr_linear_dgrad(grad, weight, csr_index(mask))
        return block_linear_dgrad(grad, weight, index)

    def dense(full: bool) -> Tensor:
        return grad @ weight if full else linear_dgrad_ref(grad, weight, mask)

    return _run("dgrad", grad, mask, sparse, dense)


def linear_wgrad_triton(grad: Tensor, x: Tensor, mask: Tensor, dense_wgrad: Tensor | None) -> Tensor:
    """reference.linear_wgrad_ref."""
    if dense_wgrad is not None and dense_wgrad:
        return linear_wgrad_ref(grad, x, mask, dense_wgrad)

    def sparse(index: BlockIndex | None) -> Tensor:
        if index is not None:
            return block_linear_wgrad(grad, x, mask, index)
        if prefers_tiles(layout_of(mask).density, x.dtype, chip.capability(x.device)):
            return sampled_linear_wgrad(grad, x, mask)
        return csr_linear_wgrad(grad, x, mask, csr_index(mask))

    return _run("wgrad", grad, mask, sparse, lambda full: linear_wgrad_ref(grad, x, mask))


def _run(
    direction: str,
    first: Tensor,
    mask: Tensor,
    sparse: Callable[[BlockIndex | None], Tensor],
    dense: Callable[[bool], Tensor],
) -> Tensor:
    """What the plan chooses for a call, timed where the plan wants to know.

    A graph that is captured gets the dense operations: they read the mask itself, at every replay, where an index would
    be that of the mask as it was.
    """
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return dense(False)
    layout = layout_of(mask)
    full = layout.nnz == layout.numel
    if first.dtype not in DTYPES or 0 in (first.numel(), mask.numel()):
        return dense(full)
    index = block_index(mask)
    site = _site(direction, first, mask, index)
    implementation, timed = plan.choose(site, layout)

    def run() -> Tensor:
        return sparse(index) if implementation == plan.NATIVE else dense(full)

    if timed and first.is_cuda:
        warm = plan.is_warm(site, direction, layout)
        result = device_clock.timed(run, site, layout, implementation, warm)
    else:
        result = run()
    plan.note(site, direction, layout, implementation)
    return result


def _site(direction: str, first: Tensor, mask: Tensor, index: BlockIndex | None) -> plan.Site:
    """The plan's site, e.g. "linear forward 512 * 1024x1024, float32, block 64, NVIDIA H200"."""
    fast = first.dtype != torch.float32 or chip.allows_tf32()
    key = direction, first.shape[0], mask.shape, first.dtype, first.device, fast, None if index is None else index.size
    site = _sites.get(key)
    if site is None:
        kind = f"block {index.size}" if index is not None else "single, 16" if fast else "single"
        device = torch.cuda.get_device_name(first.device) if first.is_cuda else "interpreted"
        dtype = "tf32" if fast and first.dtype == torch.float32 else str(first.dtype).removeprefix("torch.")
        sizes = f"{first.shape[0]} * {'x'.join(map(str, mask.shape))}"
        name = f"linear {direction} {sizes}, {dtype}, {kind.partition(',')[0]}, {device}"
        if len(_sites) >= _MOST_SITES:
            _sites.clear()
        site = _sites[key] = plan.site(name, RULE_DENSITY[kind])
    return site
