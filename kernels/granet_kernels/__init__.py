"""Sparse kernels for PyTorch: linear and conv2d layers with a masked weight, batch norm, exact top-k, and
the update of all masks at once.

Each public function checks its arguments and calls ops ``torch.ops.granet.*``, which autograd, torch.compile and the
dispatcher know. ``granet_kernels.reference`` specifies what they compute, ``granet_kernels.plan`` chooses what runs.
"""

import granet_kernels.cpu_backend.norm
import granet_kernels.cpu_backend.ops
import granet_kernels.cpu_backend.pool
import granet_kernels.cpu_backend.topk
import granet_kernels.triton_backend.dispatch  # noqa: F401  They register implementations.
from granet_kernels import plan
from granet_kernels.conv2d import conv2d
from granet_kernels.event import update_masks_
from granet_kernels.linear import linear
from granet_kernels.norm import norm
from granet_kernels.pool import max_pool
from granet_kernels.sharded import sharded_topk_mask
from granet_kernels.topk import drop, grow, topk_mask

__all__ = [
    "conv2d",
    "drop",
    "grow",
    "linear",
    "max_pool",
    "norm",
    "plan",
    "sharded_topk_mask",
    "topk_mask",
    "update_masks_",
]
