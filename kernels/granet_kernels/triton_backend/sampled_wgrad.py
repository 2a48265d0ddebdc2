"""The weight gradient of a linear layer as dense tiles of which only the kept positions are stored.

Where a tenth of all positions is kept, tensor cores compute the others in less time than a gather of the kept ones
takes. The dense gradient exists in registers alone: what is written is the sparse one, once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from granet_kernels.triton_backend import chip
from granet_kernels.triton_backend.tilings import SampledTiling, sampled_tilings

MOST_CSR_DENSITY = {
    (torch.float32, 7): 0.2,
    (torch.float32, 8): 0.2,
    (torch.float32, 9): 0.2,
    (torch.bfloat16, 7): 0.2,
    (torch.float16, 7): 0.2,
    (torch.bfloat16, 8): 0.03,
    (torch.float16, 8): 0.03,
    (torch.bfloat16, 9): 0.015,
    (torch.float16, 9): 0.015,
}
"""Up to which density gathering is faster, by dtype and major capability; computed from bandwidths, not measured.

A gather takes a time that is proportional to the density, dense tiles a constant one. Of the rate at which the L1 cache
could feed it, a gather reaches about a half in float32 and a third with values of two bytes; dense tiles take about 1.3
times as long as cuBLAS, and without tensor cores (float32, and all that Triton does on capability 7) longer.
"""


_SUPER = 8  # rows of tiles that are worked on together, so that the L2 cache holds their operands


def prefers_tiles(density: float, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether `sampled_linear_wgrad` is faster than `csr_linear_wgrad`, by MOST_CSR_DENSITY."""
    return density > MOST_CSR_DENSITY[dtype, min(max(capability[0], 7), 9)]


def sampled_linear_wgrad(grad: Tensor, x: Tensor, mask: Tensor, tiling: SampledTiling | None = None) -> Tensor:
    """What `linear_wgrad_ref` computes, float32 by IEEE arithmetic.

    Args:
        grad: (n, out) float32, bfloat16 or float16; x: (n, in) of the same dtype; any strides.
        mask: (out, in) bool.
        tiling: None = the first of `sampled_tilings`.
    Returns:
        (out, in) in the mask's layout, exactly zero off the mask.
    Raises:
        ValueError: shapes that do not fit.
    """
    n, outputs, inputs = len(x), *mask.shape
    if grad.shape != (n, outputs) or x.shape != (n, inputs):
        raise ValueError(f"expected grad {(n, outputs)} and x (n, {inputs}), got {tuple(grad.shape)}, {tuple(x.shape)}")
    w_grad = torch.empty_like(mask, dtype=x.dtype)
    if not w_grad.numel():
        return w_grad
    grad, x = grad.contiguous(), x.contiguous()
    aligned = outputs % 16 == 0 and inputs % 16 == 0
    tiling = tiling or sampled_tilings(x.dtype, chip.capability(x.device), aligned)[0]
    _sampled_tile_kernel[(triton.cdiv(outputs, tiling.outputs) * triton.cdiv(inputs, tiling.inputs),)](
        grad,
        x,
        mask.view(torch.uint8),
        w_grad,
        n,
        outputs,
        inputs,
        *mask.stride(),
        *w_grad.stride(),
        EVEN=n % tiling.samples == 0 and outputs % tiling.outputs == 0 and inputs % tiling.inputs == 0,
        OUTPUTS=tiling.outputs,
        INPUTS=tiling.inputs,
        SAMPLES=tiling.samples,
        SUPER=_SUPER,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return w_grad


@triton.jit
def _sampled_tile_kernel(
    grad,
    x,
    mask,
    w_grad,
    n,
    outputs,
    inputs,
    stride_mask_output,
    stride_mask_input,
    stride_output,
    stride_input,
    EVEN: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    SAMPLES: tl.constexpr,
    SUPER: tl.constexpr,
):
    """One program a tile: w_grad = where(mask, grad^T x, 0). EVEN: all sizes are multiples of the tile's."""
    across = (inputs + INPUTS - 1) // INPUTS
    down = (outputs + OUTPUTS - 1) // OUTPUTS
    band = tl.program_id(0) // (SUPER * across) * SUPER
    rows = tl.minimum(down - band, SUPER)
    within = tl.program_id(0) % (SUPER * across)
    output = (band + within % rows) * OUTPUTS + tl.arange(0, OUTPUTS)
    input = within // rows * INPUTS + tl.arange(0, INPUTS)
    inside = (output < outputs)[:, None] & (input < inputs)[None, :]
    far_output, far_input = output.to(tl.int64)[:, None], input.to(tl.int64)[None, :]
    flags = mask + far_output * stride_mask_output + far_input * stride_mask_input
    any_kept = tl.max(tl.max(tl.load(flags, mask=inside, other=0).to(tl.int32), 1), 0)
    sample = tl.arange(0, SAMPLES)
    grad += sample.to(tl.int64)[:, None] * outputs + output[None, :]
    x += sample.to(tl.int64)[:, None] * inputs + input[None, :]
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for start in range(0, tl.where(any_kept != 0, n, 0), SAMPLES):
        if EVEN:
            left = tl.load(grad)
            right = tl.load(x)
        else:
            there = (start + sample < n)[:, None]
            left = tl.load(grad, mask=there & (output < outputs)[None, :], other=0.0)  # [SAMPLES, OUTPUTS]
            right = tl.load(x, mask=there & (input < inputs)[None, :], other=0.0)  # [SAMPLES, INPUTS]
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
        grad += SAMPLES * outputs
        x += SAMPLES * inputs
    kept = tl.load(flags, mask=inside, other=0) != 0
    result = tl.where(kept, total, 0.0).to(w_grad.dtype.element_ty)
    tl.store(w_grad + far_output * stride_output + far_input * stride_input, result, mask=inside)
