"""The linear ops as a CUDA device gets them: the plan's choice, the right kernel for the mask, the right results.

Without a CUDA device the same functions run on tensors in CPU memory, their kernels interpreted.
"""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from granet_kernels import plan
from granet_kernels.event import update_masks_parts
from granet_kernels.linear import linear, linear_dgrad_op, linear_op, linear_wgrad_op
from granet_kernels.reference import linear_dgrad_ref, linear_ref, linear_wgrad_ref

pytest.importorskip("triton")

from granet_kernels.triton_backend import chip, dispatch, support
from granet_kernels.triton_backend import linear as triton_linear
from granet_kernels.triton_backend.linear import linear_dgrad_triton, linear_triton, linear_wgrad_triton

pytestmark = pytest.mark.usefixtures("dots_of_bfloat16")


@pytest.fixture
def triton_ops(monkeypatch, device):
    """The public ops run the Triton kernels: those registered for CUDA, or on a CPU the same ones in its place."""
    if device == "cuda":
        monkeypatch.setenv("GRANET_TRITON", "1")
        yield
        return
    ops = {linear_op: linear_triton, linear_dgrad_op: linear_dgrad_triton, linear_wgrad_op: linear_wgrad_triton}
    with ExitStack() as stack:
        for op, function in ops.items():
            stack.enter_context(op.computed_by("cpu", function))
        yield


def operands(n, mask, dtype=torch.float32):
    outputs, inputs = mask.shape
    shapes = {"x": (n, inputs), "grad": (n, outputs), "weight": (outputs, inputs), "bias": (outputs,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def blocks(rows, columns, size, density):
    kept = torch.rand(rows, columns) < density
    return kept.repeat_interleave(size, 0).repeat_interleave(size, 1)


MASKS = {
    "block 32": lambda: blocks(2, 3, 32, 0.5),
    "block 16": lambda: blocks(3, 2, 16, 0.5),
    "unstructured": lambda: torch.rand(20, 30) < 0.2,
    "full": lambda: torch.ones(16, 32, dtype=torch.bool),
    "empty": lambda: torch.zeros(9, 16, dtype=torch.bool),
}


def run(direction, values, mask, device, flag=None):
    on = {name: value.to(device) for name, value in values.items()}
    mask = mask.to(device)
    if direction == "forward":
        return linear_triton(on["x"], on["weight"], mask, on["bias"], flag).cpu()
    if direction == "dgrad":
        return linear_dgrad_triton(on["grad"], on["weight"], mask, flag).cpu()
    return linear_wgrad_triton(on["grad"], on["x"], mask, flag).cpu()


def reference(direction, values, mask, flag=None):
    if direction == "forward":
        return linear_ref(values["x"], values["weight"], mask, values["bias"])
    if direction == "dgrad":
        return linear_dgrad_ref(values["grad"], values["weight"], mask)
    return linear_wgrad_ref(values["grad"], values["x"], mask, flag)


@pytest.mark.parametrize("mode", [plan.NATIVE, plan.DENSE, plan.RULE])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("direction", plan.DIRECTIONS)
def test_every_choice_is_right(direction, kind, mode, device, assert_as_accurate):
    mask = MASKS[kind]()
    values = operands(13, mask)
    wide = {name: value.double() for name, value in values.items()}
    with plan.use(mode):
        got = run(direction, values, mask, device)
    assert_as_accurate(got, reference(direction, values, mask), reference(direction, wide, mask))


@pytest.mark.parametrize("direction", plan.DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype, direction, device, assert_as_accurate):
    mask = MASKS["unstructured"]()
    values = operands(5, mask, dtype)
    wide = {name: value.double() for name, value in values.items()}
    got = run(direction, values, mask, device)
    if dtype == torch.float64:  # by torch itself, on whatever device
        torch.testing.assert_close(got, reference(direction, values, mask), rtol=1e-12, atol=1e-12)
    else:
        assert_as_accurate(got, reference(direction, values, mask), reference(direction, wide, mask))


@pytest.mark.parametrize(("n", "shape"), [(0, (4, 5)), (3, (0, 5)), (3, (4, 0))])
@pytest.mark.parametrize("direction", plan.DIRECTIONS)
def test_nothing_to_compute(direction, n, shape, device):
    mask = torch.ones(shape, dtype=torch.bool)
    values = operands(n, mask)
    assert torch.equal(run(direction, values, mask, device), reference(direction, values, mask))


def test_the_dense_gradient_on_request(device):
    mask = MASKS["unstructured"]()
    values = operands(6, mask)
    flag = torch.ones((), dtype=torch.bool)
    got = run("wgrad", values, mask, device, flag)
    torch.testing.assert_close(got, values["grad"].t() @ values["x"])
    assert got[~mask].any()


@pytest.mark.parametrize("kind", ["block 16", "unstructured"])
def test_which_kernel_runs(kind, device, monkeypatch):
    """A mask of blocks goes to the block kernels, any other to those of single weights; "dense" to neither."""
    ran = []
    for name in ("block_linear", "csr_linear"):
        original = getattr(triton_linear, name)
        monkeypatch.setattr(
            triton_linear, name, lambda *given, name=name, original=original: (ran.append(name), original(*given))[1]
        )
    mask = MASKS[kind]()
    values = operands(4, mask)
    for mode in (plan.NATIVE, plan.DENSE):
        with plan.use(mode):
            run("forward", values, mask, device)
    assert ran == ["block_linear" if kind.startswith("block") else "csr_linear"]


def test_the_plan_knows_what_ran(device, triton_ops):
    mask = MASKS["unstructured"]().to(device)
    values = {name: value.to(device) for name, value in operands(4, mask).items()}
    weight, x = values["weight"].requires_grad_(), values["x"].requires_grad_()
    with plan.use(plan.NATIVE):
        linear(x, weight, mask, values["bias"]).sum().backward()
    assert {way: name for way, (name, _) in plan.report(mask).items()} == dict.fromkeys(plan.DIRECTIONS, plan.NATIVE)
    with plan.use(plan.DENSE):
        linear_op(values["x"], values["weight"], mask, None, None)
    assert plan.report(mask)["forward"][0] == plan.DENSE


@pytest.mark.parametrize("kind", ["block 16", "unstructured"])
def test_gradients_of_every_order(kind, device, triton_ops):
    mask = MASKS[kind]().to(device)
    values = {name: value.to(device).requires_grad_() for name, value in operands(3, mask).items()}
    twins = {name: value.detach().double().requires_grad_() for name, value in values.items()}

    def gradients(layer, values):
        y = layer(values["x"], values["weight"], mask, values["bias"])
        inputs = [values["x"], values["weight"]]
        first = torch.autograd.grad((y.sin() * y).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum((each**2).sum() for each in first), inputs)
        return [y, *first, *second]

    def exact(x, weight, mask, bias):
        return x @ torch.where(mask, weight, 0).t() + bias

    for got, expected in zip(gradients(linear, values), gradients(exact, twins), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("wanted", [False, True])
def test_where_the_kernels_are_not_wanted_the_reference_runs(wanted, device, monkeypatch):
    """What is registered for CUDA, on tensors of any device."""
    monkeypatch.setattr(support, "is_available", lambda device: wanted)
    if not wanted:
        monkeypatch.setattr(triton_linear, "_run", None)
    mask = MASKS["unstructured"]().to(device)
    values = {name: value.to(device) for name, value in operands(4, mask).items()}
    x, grad, weight, bias = (values[name] for name in ("x", "grad", "weight", "bias"))
    close = torch.testing.assert_close
    close(dispatch._linear(x, weight, mask, bias, None), linear_ref(x, weight, mask, bias))
    close(dispatch._linear_dgrad(grad, weight, mask, None), linear_dgrad_ref(grad, weight, mask))
    close(dispatch._linear_wgrad(grad, x, mask, None), linear_wgrad_ref(grad, x, mask))
    scores, counts, bounds = torch.randn(9, device=device), torch.tensor([2]), torch.tensor([0, 9])
    own, twin = [scores.clone()], [scores.clone()]
    for update, weights in ((dispatch._update_masks, own), (update_masks_parts, twin)):
        kept = [torch.ones(9, dtype=torch.bool, device=device)]
        assert update(kept, weights, [], [], [], [], [4], None, False, [True], True).tolist() == [4]
        assert torch.equal(kept[0], weights[0] != 0)
    assert torch.equal(own[0], twin[0])
    selected = dispatch._topk_mask([scores], counts, bounds, None, False)
    assert set(selected.nonzero().flatten().tolist()) == set(scores.topk(2).indices.tolist())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_follows_the_mask():
    mask = MASKS["unstructured"]().to("cuda")
    values = {name: value.to("cuda") for name, value in operands(4, mask).items()}
    x, weight = values["x"], values["weight"]
    linear_triton(x, weight, mask, None, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear_triton(x, weight, mask, None, None)
    for _ in range(2):
        mask.copy_(torch.rand(mask.shape, device="cuda") < 0.3)
        graph.replay()
        torch.testing.assert_close(y, linear_ref(x, weight, mask))


def test_either_way_to_allow_tf32(monkeypatch):
    """torch raises if it is asked in the old way after it was told in the new one."""
    assert chip.allows_tf32() is torch.backends.cuda.matmul.allow_tf32

    class Told:
        fp32_precision = "tf32"

        @property
        def allow_tf32(self):
            raise RuntimeError("mix of the legacy and new APIs")

    told = Told()
    monkeypatch.setattr(torch.backends.cuda, "matmul", told)
    assert chip.allows_tf32()
    told.fp32_precision = "ieee"
    assert not chip.allows_tf32()


def test_sites_by_kind(device):
    """What a time depends on is in the name: shape, dtype, kind of mask, device."""
    values = operands(4, torch.ones(32, 32, dtype=torch.bool))
    block, single = blocks(2, 2, 16, 0.5), torch.rand(32, 32) < 0.1
    block[0, 0] = block[0, 1]
    names = set()
    for mask in (block, single):
        with plan.use(plan.NATIVE):
            run("forward", values, mask, device)
        if device == "cpu":
            names |= {note.site.key for note in triton_linear.layout_of(mask).last.values()}
    if device == "cpu":
        assert all(name.startswith("linear forward 4 * 32x32, float32, ") for name in names)
        assert len(names) == 2
