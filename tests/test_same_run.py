"""One run on three implementations: the reference, the native CPU kernels, and the Triton kernels.

The latter are interpreted, unless there is a CUDA device.

GraNet from half the weights to a tenth, on real digits: the masks are the same at every update, and the losses are the
same but for rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import granet
from granet.data.named import read_digits
from granet_kernels import plan
from granet_kernels.cpu_backend import library
from granet_kernels.cpu_backend.topk import topk_mask_cpu
from granet_kernels.event import update_masks_op, update_masks_parts
from granet_kernels.linear import linear_dgrad_op, linear_op, linear_wgrad_op
from granet_kernels.topk import topk_mask_op

pytest.importorskip("triton")

STEPS, UPDATE_EVERY, BATCH = 200, 20, 32
LAYER_OPS = (linear_op, linear_dgrad_op, linear_wgrad_op)


@contextmanager
def reference() -> Iterator[None]:
    """Nothing that is registered for a CPU."""
    with ExitStack() as stack:
        for op in LAYER_OPS:
            stack.enter_context(op.computed_by("cpu", op.reference))
        stack.enter_context(topk_mask_op.set_kernel_enabled("cpu", False))
        yield


@contextmanager
def native() -> Iterator[None]:
    if library.load() is None:
        pytest.skip("no native library")
    yield


@contextmanager
def triton() -> Iterator[None]:
    """What is registered for CUDA, on tensors in CPU memory; cut into fewer programs, which are interpreted in turn."""
    if torch.cuda.is_available():
        with patch.dict(os.environ, {"GRANET_TRITON": "1"}):
            yield
        return
    from granet_kernels.triton_backend import csr_index, csr_linear
    from granet_kernels.triton_backend.event import update_masks_triton
    from granet_kernels.triton_backend.linear import linear_dgrad_triton, linear_triton, linear_wgrad_triton
    from granet_kernels.triton_backend.topk import topk_mask_triton

    selections = {topk_mask_op: topk_mask_triton, update_masks_op: update_masks_triton}
    before = {topk_mask_op: topk_mask_cpu, update_masks_op: update_masks_parts}
    with ExitStack() as stack:
        for op, function in zip(LAYER_OPS, (linear_triton, linear_dgrad_triton, linear_wgrad_triton), strict=True):
            stack.enter_context(op.computed_by("cpu", function))
        for selection, function in selections.items():
            selection.register_kernel("cpu")(function)
            stack.callback(selection.register_kernel("cpu"), before[selection])
        stack.enter_context(patch.multiple(csr_linear, _CHUNKS=1, _PROGRAMS=1))
        stack.enter_context(patch.object(csr_index, "group_of", lambda lines: 32))
        yield


def train(device: str = "cpu") -> tuple[list[torch.Tensor], list[float]]:
    """The kept units after each update, and the losses."""
    torch.manual_seed(0)
    digits = read_digits()
    images, labels = digits.train_images.float() / 16 - 0.5, digits.train_labels
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    images, labels, model = images.to(device), labels.to(device), model.to(device)
    model = granet.sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = granet.methods.GraNet(
        sparsity=0.9, initial_sparsity=0.5, update_every=UPDATE_EVERY, prune_until=0.6, total_steps=STEPS
    )
    sparsifier = granet.Sparsifier(model, optimizer, method)
    kept, losses = [], []
    for step in range(1, STEPS + 1):
        batch = torch.arange(step * BATCH, (step + 1) * BATCH) % len(images)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if method.is_update(step):
            kept.append(sparsifier.kept().cpu())
    return kept, losses


@pytest.fixture(scope="module")
def of_reference() -> tuple[list[torch.Tensor], list[float]]:
    with plan.use(plan.NATIVE), reference():
        return train()


ON = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("implementation", "device"),
    [
        pytest.param(native, "cpu", id="native"),
        pytest.param(triton, ON, id="cuda" if ON == "cuda" else "interpreted"),
    ],
)
def test_the_same_masks_and_losses(implementation, device, of_reference):
    with implementation():
        masks, losses = train(device)
    expected_masks, expected_losses = of_reference
    assert len(masks) == len(expected_masks) == (STEPS - 1) // UPDATE_EVERY
    assert len({int(mask.count_nonzero()) for mask in masks}) > 3
    for number, (mask, expected) in enumerate(zip(masks, expected_masks, strict=True)):
        assert torch.equal(mask, expected), f"update {number + 1}: {int((mask != expected).sum())} units differ"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-4, atol=1e-5)
    assert losses[-1] < 0.5 * losses[0]
