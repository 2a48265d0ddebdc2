"""What each method does at its updates, on layers small enough to follow."""

import pytest
import torch
from torch import nn

import granet
from granet.methods import GMP, ITOP, SET, RigL, Static, all_methods


def make(method, weights=None, names=("a", "b")):
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(10, 10, bias=False) for name in names})
    granet.sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return model, optimizer, granet.Sparsifier(model, optimizer, method)


def step(model, optimizer, gradient=None):
    for layer in model.values():
        layer.weight.grad = torch.randn(10, 10) if gradient is None else gradient.clone()
    optimizer.step()


def kept(sparsifier):
    return [layer.kept for layer in sparsifier.layers]


def test_every_method_says_what_it_is():
    for name, method in all_methods().items():
        assert method.name == name
        assert all((method.family, method.source, method.summary))
        assert method.source.startswith("arXiv:")


def test_static_never_changes_its_random_mask():
    model, optimizer, sparsifier = make(Static(sparsity=0.7, total_steps=10))
    before = sparsifier.kept()
    assert kept(sparsifier) == [30, 30]
    for _ in range(10):
        step(model, optimizer)
    assert torch.equal(sparsifier.kept(), before)
    assert not sparsifier.needs_gradient


def test_rigl_exchanges_the_rounded_down_ratio_until_three_quarters():
    method = RigL(sparsity=0.5, update_every=10, total_steps=100)
    assert [t for t in range(101) if method.is_update(t)] == [10, 20, 30, 40, 50, 60, 70]
    assert method.ratio_at(0) == 0.3
    assert method.ratio_at(75) == 0
    assert method.drop_count(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996
    assert method.drop_count(0.299, 100) == 29


def test_rigl_drops_the_smallest_and_grows_the_largest_gradient():
    model, optimizer, sparsifier = make(RigL(sparsity=0.5, update_every=1, total_steps=100))
    layer = sparsifier.layers[0]
    before = layer.mask.flatten().clone()
    magnitude = layer.weight.detach().abs().flatten()
    gradient = torch.arange(100.0).reshape(10, 10)
    step(model, optimizer, gradient)
    n = method_count = int(sparsifier.method.ratio_at(1) * 50)
    assert method_count == 14
    dropped = magnitude.masked_fill(~before, 9).argsort()[:n]
    after = before.clone()
    after[dropped] = False
    free = (~after).nonzero().flatten()
    grown = free[gradient.flatten()[free].argsort(descending=True)[:n]]
    after[grown] = True
    assert torch.equal(layer.mask.flatten(), after)
    assert kept(sparsifier) == [50, 50]


def test_set_grows_the_same_units_for_the_same_seed_and_others_for_another():
    def grown(seed):
        torch.manual_seed(0)
        model = granet.sparsify(nn.ModuleDict({"a": nn.Linear(10, 10, bias=False)}))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        sparsifier = granet.Sparsifier(model, optimizer, SET(update_every=1, total_steps=9), seed=seed)
        step(model, optimizer)
        return sparsifier.kept()

    assert torch.equal(grown(1), grown(1))
    assert not torch.equal(grown(1), grown(2))


def test_set_needs_no_gradient_and_keeps_the_counts():
    model, optimizer, sparsifier = make(SET(sparsity=0.8, update_every=2, total_steps=20))
    before = sparsifier.kept()
    for _ in range(4):
        assert not sparsifier.needs_gradient
        step(model, optimizer)
    assert kept(sparsifier) == [20, 20]
    assert not torch.equal(sparsifier.kept(), before)


def test_set_by_sign_drops_the_small_positives_and_the_large_negatives():
    method = SET(sparsity=0.5, update_every=1, total_steps=9, drop="signed", drop_ratio=0.5)
    model, optimizer, sparsifier = make(method)
    layer = sparsifier.layers[0]
    positions = layer.mask.flatten().nonzero().flatten()
    values = torch.linspace(-1, 2, 50)  # 17 negative, 33 positive
    with torch.no_grad():
        layer.weight.view(-1)[positions] = values
    negative = int((values < 0).sum())
    step(model, optimizer)
    weights = layer.weight.detach().flatten()
    # A dropped unit that was grown again at once keeps its value, so only what is left can be said.
    survivors = set(weights[weights != 0].tolist())
    largest = set(values[values >= 0].sort().values[-(33 - 16) :].tolist())
    farthest = set(values[values < 0].sort().values[: negative - negative // 2].tolist())
    assert largest | farthest <= survivors
    assert layer.kept == 50


def test_set_by_epsilon_gives_each_layer_its_erdos_renyi_count():
    _, _, sparsifier = make(SET(epsilon=2.5, update_every=1, total_steps=9))
    assert kept(sparsifier) == [50, 50]  # 2.5 * (10 + 10) / 100 of 100


def test_an_interval_in_epochs_needs_their_length():
    assert SET(total_steps=50, steps_per_epoch=10).is_update(10)
    with pytest.raises(ValueError, match=r"SET.update_every: expected steps_per_epoch"):
        make(SET(total_steps=50))


@pytest.mark.parametrize(("growth", "every"), [("gradient", 4000), ("random", 1500)])
def test_itop_exchanges_seldom_and_to_the_end(growth, every):
    method = ITOP(growth=growth, total_steps=3 * every + 1)
    assert [t for t in range(0, 3 * every + 2, 500) if method.is_update(t)] == [every, 2 * every, 3 * every]
    assert method.needs_gradient(every) == (growth == "gradient")
    assert method.ratio_at(0) == 0.5
    assert method.ratio_at(3 * every + 1) == 0.005


def test_gmp_zeroes_what_it_prunes_and_never_brings_it_back():
    model, optimizer, sparsifier = make(GMP(sparsity=0.8, update_every=2, prune_until=8, total_steps=10))
    before = sparsifier.kept()
    for t in range(1, 11):
        step(model, optimizer)
        now = sparsifier.kept()
        assert not (now & ~before).any()
        before = now
        if t == 2:  # .8 - .8 * (1 - 2/8)^3 = .4625 of 200
            assert sum(kept(sparsifier)) == round(200 * (1 - 0.4625))
    assert sum(kept(sparsifier)) == 40
    assert not sparsifier.needs_gradient


def test_gmp_that_masks_keeps_stored_values_and_lets_them_return():
    method = GMP(form="mask", scope="layer", sparsity=0.5, update_every=2, prune_until=4, total_steps=10)
    model, optimizer, sparsifier = make(
        GMP(form="mask", scope="layer", sparsity=0.5, update_every=1, prune_until=4, total_steps=9)
    )
    weight = model["a"].weight
    stored = weight.detach().clone()
    for _ in range(3):
        step(model, optimizer)
    assert torch.equal(weight.detach(), stored)
    pruned = (~model["a"].mask).nonzero()[0].tolist()
    with torch.no_grad():
        weight[tuple(pruned)] = 100.0
    step(model, optimizer)
    assert model["a"].mask[tuple(pruned)]
    assert kept(sparsifier) == [50, 50]
    assert method.zeroing is False


def test_gmp_with_caps_is_gale_s_setting():
    method = GMP(
        sparsity=0.9,
        scope="layer",
        max_sparsity={"conv1": 0.0, "f?": 0.8},
        update_every=1,
        prune_until=2,
        total_steps=4,
    )
    model, optimizer, sparsifier = make(method, names=("conv1", "mid", "fc"))
    for _ in range(2):
        step(model, optimizer)
    assert kept(sparsifier) == [100, 10, 20]


def test_pruning_by_layer_is_exact_although_rounding_moves_units_between_layers():
    torch.manual_seed(0)
    shapes = [(3, 7), (6, 3), (7, 8), (8, 2)]
    model = nn.ModuleDict({str(i): nn.Linear(cols, rows, bias=False) for i, (rows, cols) in enumerate(shapes)})
    granet.sparsify(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = GMP(sparsity=0.6, scope="layer", update_every=1, prune_until=5, total_steps=6)
    sparsifier = granet.Sparsifier(model, optimizer, method)
    for _ in range(5):
        for layer in model.values():
            layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    assert sum(kept(sparsifier)) == 44  # round(.4 * 111)


@pytest.mark.parametrize(
    ("make_method", "message"),
    [
        (lambda: GMP(form="both"), "GMP.form: expected 'zero' or 'mask', got 'both'"),
        (lambda: GMP(scope="all"), "GMP.scope: expected 'global' or 'layer', got 'all'"),
        (lambda: GMP(max_sparsity={"fc": 0.5}), 'GMP.max_sparsity: expected nothing unless scope is "layer"'),
        (lambda: GMP(scope="layer", max_sparsity={"fc": 2}), r"GMP.max_sparsity: expected sparsities in \[0, 1\]"),
        (lambda: RigL(drop_ratio=-1), r"RigL.drop_ratio: expected a number in \[0, 1\], got -1"),
        (lambda: SET(drop="small"), "SET.drop: expected 'magnitude' or 'signed', got 'small'"),
        (lambda: SET(epsilon=0), "SET.epsilon: expected a positive number or None, got 0"),
        (lambda: ITOP(growth="none"), "ITOP.growth: expected 'gradient' or 'random', got 'none'"),
        (lambda: make(GMP(scope="layer", max_sparsity={"x*": 0.5}, total_steps=4000)), "'x\\*' matches none"),
    ],
)
def test_settings_out_of_range_are_refused(make_method, message):
    with pytest.raises(ValueError, match=message):
        make_method()
