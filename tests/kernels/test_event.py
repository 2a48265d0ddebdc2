"""The update of all masks: the op against granet's Topology, the Triton kernels against the op."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import granet
from granet.granularity import Unstructured
from granet.topology import Topology
from granet_kernels.event import exchanged, update_masks_, update_masks_op, update_masks_parts


@dataclass
class Net:
    """The arguments of an update that it changes or reads."""

    masks: list = field(default_factory=list)
    weights: list = field(default_factory=list)
    growth: list = field(default_factory=list)
    states: list = field(default_factory=list)
    fills: list = field(default_factory=list)

    def add(self, shape, density=0.5, states=(torch.float32,), kind=torch.randn):
        mask = torch.rand(shape) < density
        self.masks.append(mask)
        self.weights.append(torch.where(torch.rand(shape) < 0.9, kind(shape), 0.0))  # kept weights may be 0
        self.growth.append(kind(shape))
        self.states.append([torch.randn(shape).to(dtype) for dtype in states])
        self.fills.append([0.1 * number for number in range(len(states))])
        return self

    def copy_on(self, device):
        moved = copy.deepcopy(self)
        for name in ("masks", "weights", "growth"):
            setattr(moved, name, [each.to(device) for each in getattr(moved, name)])
        moved.states = [[each.to(device) for each in tensors] for tensors in moved.states]
        return moved

    def kept(self):
        return sum(int(mask.sum()) for mask in self.masks)

    def changed(self):
        return [*self.masks, *self.weights, *(state for tensors in self.states for state in tensors)]


def few_values(shape):
    return torch.randint(-2, 3, shape).float()


def small_net(kind=torch.randn):
    net = Net().add((30, 10), kind=kind).add((1, 1), 1.0, (), kind).add((7, 9), 0.2, (torch.bfloat16,), kind)
    net.add((4, 3, 3, 3), 1.0, (torch.float32, torch.bfloat16), kind).add((0, 4)).add((10, 10), 0.0, kind=kind)
    return net.add((7, 1), 0.9, kind=kind)


def options_of(net, keep, ratio):
    masks = net.masks
    of_layers = [int(mask.sum()) * 2 // 3 for mask in masks]
    keep = {"no pruning": None, "global": net.kept() // 2, "layers": of_layers, "nothing": 0, "all": net.kept()}[keep]
    return {"keep": keep, "ratio": ratio}


def run(function, net, keep=None, ratio=None, round_up=False, can_grow=None, keep_regrown=True):
    """Call an implementation with the signature of the op."""
    return function(
        net.masks,
        net.weights,
        [] if ratio is None else net.growth,
        [state for tensors in net.states for state in tensors],
        [layer for layer, tensors in enumerate(net.states) for _ in tensors],
        [fill for values in net.fills for fill in values],
        [keep] if isinstance(keep, int) else keep,
        ratio,
        round_up,
        [True] * len(net.masks) if can_grow is None else can_grow,
        keep_regrown,
    )


class Layer:
    """What a Topology reads of a granet.topology.Layer."""

    def __init__(self, weight):
        self.weight = nn.Parameter(weight)
        self.granularity = Unstructured()
        self.units = weight.numel()


def by_topology(net, keep, ratio, round_up, can_grow, keep_regrown):
    """The same update through granet.topology.Topology and what the Sparsifier does with it."""
    layers = [Layer(weight) for weight in net.weights]
    growth = torch.cat([each.reshape(-1) for each in net.growth])
    kept = torch.cat([mask.reshape(-1) for mask in net.masks])
    topology = Topology(layers, kept, torch.Generator(), growth.abs(), can_grow)
    if keep is not None:
        topology.prune(topology.magnitude(), keep)
    if ratio is not None:
        up = [math.ceil(ratio * n - 1e-9) if round_up else math.floor(ratio * n + 1e-9) for n in topology.counts()]
        counts = topology.where_gradient(up)
        topology.exchange(topology.magnitude(), topology.gradient(), counts, keep_regrown=keep_regrown)
    for (_, kept, survivors), mask, weight, states, fills in zip(
        topology.parts(), net.masks, net.weights, net.states, net.fills, strict=True
    ):
        restart = ~survivors.view(mask.shape)
        mask.copy_(kept.view(mask.shape))
        weight.masked_fill_(restart, 0)
        for state, fill in zip(states, fills, strict=True):
            state.masked_fill_(restart, fill)
    return torch.tensor(topology.counts())


def assert_same(net, other):
    for one, two in zip(net.changed(), other.changed(), strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two.cpu())


@pytest.mark.parametrize("keep", ["no pruning", "global", "layers", "nothing"])
@pytest.mark.parametrize("ratio", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", [torch.randn, few_values], ids=["any", "tied"])
def test_the_op_is_what_topology_and_sparsifier_do(keep, ratio, kind):
    for round_up, keep_regrown in itertools.product((False, True), repeat=2):
        net = Net().add((30, 10), kind=kind).add((7, 9), 0.2, kind=kind).add((4, 3, 3, 3), 1.0, kind=kind).add((9, 1))
        other = copy.deepcopy(net)
        options = {**options_of(net, keep, ratio), "round_up": round_up, "keep_regrown": keep_regrown}
        can_grow = [True, False, True, True]
        totals = update_masks_(
            net.masks,
            net.weights,
            None if ratio is None else net.growth,
            net.states,
            net.fills,
            can_grow=can_grow,
            **options,
        )
        assert torch.equal(totals, by_topology(other, can_grow=can_grow, **options))
        assert_same(net, other)


def test_the_op_is_what_a_sparsifier_does_in_training():
    model = granet.sparsify(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 9)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = Net()
    optimizer.register_step_post_hook(lambda *_: before.__init__(**snapshot(sparsifier, optimizer)))
    method = granet.methods.GraNet(sparsity=0.8, initial_sparsity=0.3, update_every=2, total_steps=20)
    sparsifier = granet.Sparsifier(model, optimizer, method)
    updates = 0
    for step in range(1, 21):
        optimizer.zero_grad()
        model(torch.randn(16, 20)).square().sum().div(100).backward()
        optimizer.step()
        if method.is_update(step):
            updates += 1
            ratio = method.ratio_at(step) if method.exchanges(step) else None
            keep = method.counts_at(sparsifier.layers, step) if method.prunes(step) else None
            growth = None if ratio is None else before.growth
            arguments = (before.masks, before.weights, growth, before.states)
            totals = update_masks_(*arguments, keep=keep, ratio=ratio, round_up=True)
            assert totals.tolist() == [layer.kept for layer in sparsifier.layers]
            assert_same(before, Net(**snapshot(sparsifier, optimizer)))
    assert updates == 9


def snapshot(sparsifier, optimizer):
    """What `Net` holds, of copies."""
    layers = sparsifier.layers
    growth = sparsifier._tap.growth
    parts = (
        [torch.zeros(layer.units) for layer in layers] if growth is None else growth.split([la.units for la in layers])
    )
    return {
        "masks": [layer.mask.clone() for layer in layers],
        "weights": [layer.weight.detach().clone() for layer in layers],
        "growth": [part.view(layer.shape).clone() for part, layer in zip(parts, layers, strict=True)],
        "states": [[optimizer.state[layer.weight]["momentum_buffer"].clone()] for layer in layers],
        "fills": [[0.0] for _ in layers],
    }


def test_versions_are_counted():
    """By which a layout of a mask knows that it is out of date."""
    net = Net().add((4, 5))
    weight = nn.Parameter(net.weights[0])
    tensors = (net.masks[0], weight, net.states[0][0])
    before = [tensor._version for tensor in tensors]
    update_masks_(net.masks, [weight], None, net.states, keep=1)
    assert all(tensor._version > version for tensor, version in zip(tensors, before, strict=True))


def test_opcheck():
    net = Net().add((4, 5)).add((3, 3), states=(torch.float32, torch.bfloat16))
    arguments = []
    run(lambda *args: arguments.extend(args), net, 9, 0.4)
    torch.library.opcheck(update_masks_op, tuple(arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": []}, "expected one layer or more, got none"),
        ({"weights": []}, "expected one of weights per layer, 1 in all, got 0"),
        ({"weights": [torch.zeros(2, 2)]}, r"expected weights\[0\] of the mask's shape \(2, 3\)"),
        ({"weights": [torch.zeros(2, 3).double()]}, r"expected weights\[0\] of dtype torch.float32"),
        ({"masks": [torch.zeros(2, 3)]}, r"expected masks\[0\] of dtype torch.bool"),
        ({"growth": None}, "expected growth if there is a ratio"),
        ({"ratio": 1.5}, r"expected ratio in \[0, 1\], got 1.5"),
        ({"keep": 7}, "expected 0 <= keep <= 6"),
        ({"keep": [1, 2]}, "expected one of keep per layer"),
        ({"states": [[torch.zeros(3)]]}, r"expected states\[0\] of the mask's shape"),
        ({"states": [[torch.zeros(2, 3).double()]]}, r"expected states\[0\] of dtype"),
        ({"states": [[torch.zeros(2, 3)]], "fills": [[]]}, r"expected one of fills\[0\] per state"),
        ({"can_grow": [True, True]}, "expected one of can_grow per layer"),
    ],
    ids=str,
)
def test_wrong_arguments(change, message):
    mask, weight = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3)
    options = {"masks": [mask], "weights": [weight], "growth": [weight.clone()], "keep": 1, "ratio": 0.5} | change
    with pytest.raises(ValueError, match=message):
        update_masks_(**options)
    assert mask.all()
    assert weight.all()


def test_state_needs_no_fill():
    net = Net().add((4, 5))
    update_masks_(net.masks, net.weights, None, net.states, keep=0)
    assert not net.states[0][0].any()


triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from granet_kernels.triton_backend import event, selection, table  # noqa: E402
from granet_kernels.triton_backend.event import update_masks_triton  # noqa: E402
from granet_kernels.triton_backend.update import exchanged as exchanged_kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small_blocks(monkeypatch):
    for name, value in {"BLOCK": 128, "THREADS": 16, "BINS": 64, "CHUNK": 1024, "SAMPLE": 256}.items():
        monkeypatch.setattr(table, name, value)
    monkeypatch.setattr(table, "_tables", {})


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels launched."""
    names = []
    for module in (event, selection):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _Counted(kernel, names))
    return names


class _Counted:
    def __init__(self, kernel, names):
        self.kernel, self.names = kernel, names

    def __getitem__(self, grid):
        self.names.append(self.kernel.fn.__name__)
        return self.kernel[grid]


def check(net, **options):
    """Raise unless Triton does what the op does. Memory that is not written shows: torch.empty is all ones."""
    other = net.copy_on(DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        totals = run(update_masks_triton, other, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(run(update_masks_parts, net, **options), totals.cpu())
    assert_same(net, other)


@pytest.mark.parametrize(
    ("keep", "ratio", "kind"),
    [
        ("no pruning", None, torch.randn),
        ("no pruning", 0.3, few_values),
        ("global", None, few_values),
        ("global", 0.5, torch.randn),
        ("global", 0.0, few_values),
        ("layers", 1.0, few_values),
        ("layers", 0.4, torch.randn),
        ("nothing", 0.5, torch.randn),
        ("all", 0.3, few_values),
    ],
)
def test_triton_does_what_the_op_does(keep, ratio, kind, small_blocks):
    net = small_net(kind)
    check(net, **options_of(net, keep, ratio), round_up=ratio == 0.5, keep_regrown=keep in ("global", "all"))


@pytest.mark.parametrize("size", [1, 7, 63, 100, 300])
def test_odd_sizes(size, small_blocks):
    net = Net().add((size, 1)).add((size, 1), 0.3)
    check(net, keep=net.kept() // 2, ratio=0.4, can_grow=[True, False])


def test_weights_in_other_memory_formats(small_blocks):
    net = Net().add((6, 5, 3, 3)).add((8, 9)).add((40, 7))
    for name in ("masks", "weights", "growth"):
        tensors = getattr(net, name)
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
        tensors[1] = tensors[1].t().contiguous().t()
    net.states[0][0] = net.states[0][0].to(memory_format=torch.channels_last)
    net.weights[2] = torch.randn(7, 80).t()[::2]
    check(net, keep=net.kept() // 2, ratio=0.4)


def test_tensors_that_begin_anywhere(small_blocks):
    net = Net().add((301, 1))
    net.weights[0] = torch.randn(302, 1)[1:]
    net.states[0][0] = torch.randn(303, 1)[2:]
    check(net, keep=net.kept() // 2, ratio=0.4)


def test_blocks_of_full_size():
    net = Net().add((1700, 2)).add((10, 10))
    check(net, keep=net.kept() // 2, ratio=0.4, round_up=True)


@pytest.mark.parametrize("keep_regrown", [False, True])
def test_many_tiles(keep_regrown, small_blocks, monkeypatch):
    monkeypatch.setattr(table, "LARGE", 0)
    net = Net().add((700, 2)).add((100, 1), 0.1)
    check(net, keep=net.kept() // 2, ratio=0.3, keep_regrown=keep_regrown)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("keep", "ratio", "number"), [(9, 0.5, 12), (None, 0.5, 9), (9, None, 6)])
def test_launches(layers, keep, ratio, number, launches, small_blocks):
    net = Net()
    for _ in range(layers):
        net.add((20, 3))
    check(net, keep=keep, ratio=ratio)
    assert len(launches) == number


def test_too_many_units_go_to_the_reference(monkeypatch):
    monkeypatch.setattr(event, "MOST_UNITS", 10)
    monkeypatch.setattr(event, "find", None)
    check(Net().add((11, 1)), keep=4, ratio=0.5)


@triton.jit
def _exchanged_kernel(kept, ratio, amounts, UP: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    amount = exchanged_kernel(tl.load(kept + places), tl.load(ratio), tl.load(ratio + 1), UP)
    tl.store(amounts + places, amount)


@pytest.mark.parametrize("round_up", [False, True], ids=["down", "up"])
def test_numbers_to_exchange_are_those_of_python(round_up):
    """Ratios and numbers whose product is an integer, or would be, are the ones to go wrong."""
    generator = torch.Generator().manual_seed(0)
    ratios = [0.0, 1.0, 0.1, 0.3, 0.5, 1 / 3, 2 / 3, 0.005, 0.7, 0.29, *torch.rand(20, generator=generator).tolist()]
    counts = torch.cat([torch.arange(1024), torch.randint(2**40, (1024,), generator=generator)])
    for ratio in ratios:
        amounts = torch.empty_like(counts, device=DEVICE)
        numbers = torch.tensor([ratio, -1e-9 if round_up else 1e-9], dtype=torch.float64, device=DEVICE)
        _exchanged_kernel[(2,)](counts.to(DEVICE), numbers, amounts, UP=round_up, BLOCK=1024, enable_fp_fusion=False)
        assert amounts.tolist() == [exchanged(count, ratio, round_up) for count in counts.tolist()]
