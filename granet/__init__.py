"""granet: train networks that are sparse while they train."""

from granet import flops, methods
from granet.convert import sparsify
from granet.gradients import NonFiniteGradientError
from granet.granularity import NM, Block, Filter, Granularity, Unstructured
from granet.modules import SparseConv2d, SparseLinear
from granet.sparsifier import Sparsifier

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Block",
    "Filter",
    "Granularity",
    "NonFiniteGradientError",
    "SparseConv2d",
    "SparseLinear",
    "Sparsifier",
    "Unstructured",
    "flops",
    "methods",
    "sparsify",
]
