"""Shapes, strides and operands on which kernels of layers are compared."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# name: (x shape, weight shape, stride, padding, dilation)
GEOMETRIES = {
    "3x3": ((17, 5, 9, 8), (6, 5, 3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3-wide": ((2, 3, 5, 61), (4, 3, 3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3-many-channels": ((3, 67, 4, 4), (35, 67, 3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3-unpadded": ((18, 3, 8, 19), (7, 3, 3, 3), (1, 1), (0, 0), (1, 1)),
    "1x1": ((3, 7, 6, 5), (9, 7, 1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1-stride": ((5, 7, 9, 6), (4, 7, 1, 1), (2, 2), (0, 0), (1, 1)),
    "1x1-padded": ((2, 3, 4, 4), (4, 3, 1, 1), (1, 1), (1, 2), (1, 1)),
    "3x3-stride": ((16, 3, 13, 12), (4, 3, 3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3-dilation": ((3, 4, 11, 10), (5, 4, 3, 3), (1, 1), (2, 2), (2, 2)),
    "7x7-stride": ((2, 3, 21, 22), (8, 3, 7, 7), (2, 2), (3, 3), (1, 1)),
    "uneven": ((19, 3, 9, 13), (2, 3, 2, 3), (2, 1), (0, 2), (1, 3)),
    "stride-over-kernel": ((2, 3, 10, 11), (4, 3, 2, 2), (3, 4), (0, 1), (1, 1)),
    "padding-over-kernel": ((2, 3, 3, 2), (4, 3, 2, 2), (1, 1), (3, 4), (1, 1)),
    "kernel-as-image": ((33, 4, 3, 3), (5, 4, 3, 3), (1, 1), (0, 0), (1, 1)),
    "one-pixel": ((1, 1, 1, 1), (1, 1, 3, 3), (1, 1), (1, 1), (1, 1)),
}
# Every combination of these; sides are those of the images.
PRODUCT = {
    "kernel": [(1, 1), (3, 3), (2, 3)],
    "stride": [(1, 1), (2, 2), (1, 3)],
    "padding": [(0, 0), (1, 1), (2, 1)],
    "dilation": [(1, 1), (2, 2), (1, 2)],
}
SIDES = [(9, 8), (5, 17)]
LINEAR = {
    f"{n}x{i}-{o}": (n, i, o)
    for n, i, o in [(1, 7, 1), (63, 1, 7), (7, 63, 100), (100, 300, 63), (300, 100, 300), (70, 1200, 15)]
}
SPARSITIES = [0, 0.5, 0.9, 1]
ISAS = ["portable", "avx2", "avx512"]


def sliced(t):
    """The same values, every second one of a larger tensor."""
    large = t.new_full([2 * size + 1 for size in t.shape], torch.nan)
    view = large[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def part_of_the_channels(images):
    n, c, h, w = images.shape
    return torch.full((n, c + 3, h, w), torch.nan)[:, 2 : 2 + c].copy_(images)


def in_channels_last(images):
    return images.contiguous(memory_format=torch.channels_last)


def expanded(images):
    return images[:1, :, :1].expand_as(images)


def as_double(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


# name: (function of x, function of the output's gradient, memory format of the weight and the mask)
LAYOUTS = {
    "contiguous": (torch.clone, torch.clone, torch.contiguous_format),
    "channels-last": (in_channels_last, in_channels_last, torch.channels_last),
    "mixed": (torch.clone, in_channels_last, torch.channels_last),
    "sliced": (sliced, sliced, torch.contiguous_format),
    "transposed": (transposed, transposed, torch.channels_last),
    "expanded": (lambda t: t[:1].expand_as(t), lambda t: t[:1, :1, :1, :1].expand_as(t), torch.contiguous_format),
}


def conv_operands(random_mask, geometry, sparsity, layout="contiguous"):
    """x, gradient of y, weight, mask, bias and the numbers of a geometry, by its name or as GEOMETRIES has it."""
    x_shape, w_shape, *rest = GEOMETRIES[geometry] if isinstance(geometry, str) else geometry
    lay_x, lay_grad, w_format = LAYOUTS[layout]
    x, weight = lay_x(torch.randn(x_shape)), torch.randn(w_shape).contiguous(memory_format=w_format)
    grad = lay_grad(torch.randn_like(F.conv2d(x, weight, None, *rest)))
    mask = random_mask(w_shape, 1 - sparsity).contiguous(memory_format=w_format)
    return x, grad, weight, mask, torch.randn(w_shape[0]), rest


def linear_operands(random_mask, sizes, sparsity, lay=torch.clone):
    """x, gradient of y, weight, mask and bias; sizes: n, in, out."""
    n, inputs, outputs = sizes
    mask = random_mask((outputs, inputs), 1 - sparsity)
    x, grad = lay(torch.randn(n, inputs)), lay(torch.randn(n, outputs))
    return x, grad, torch.randn(outputs, inputs), mask, torch.randn(outputs)
