"""Sparse kernels for PyTorch: linear and conv2d layers with a masked weight, and exact selection of what to keep.

Each public function checks its arguments and calls ops ``torch.ops.granet.*``, which autograd, torch.compile and the
dispatcher know. ``granet_kernels.reference`` specifies what they compute.
"""

from granet_kernels.conv2d import conv2d
from granet_kernels.linear import linear
from granet_kernels.topk import drop, grow, topk_mask

__all__ = ["conv2d", "drop", "grow", "linear", "topk_mask"]
