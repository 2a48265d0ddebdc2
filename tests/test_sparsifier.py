import copy
import io

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import granet
from granet.convert import sparse_weights
from granet.distribution import kept_units
from granet.methods import GMP, ITOP, SET, GraNet, RigL, Static
from granet_kernels import plan
from granet_kernels.cpu_backend import library
from granet_kernels.layout import bucket_of, layout_of
from granet_kernels.plan_times import Times


def make_model(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), **sparsify):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))
    granet.sparsify(model, **sparsify)
    return model, optimizer(model.parameters())


def make(method, *args, seed=0, **kwargs):
    model, optimizer = make_model(*args, **kwargs)
    return model, optimizer, granet.Sparsifier(model, optimizer, method, seed=seed)


def backward(model, seed=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    x = torch.randn(8, 2, 6, 6, generator=generator)
    loss = model(x).square().mean() * scale
    loss.backward()
    return loss


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(model, seed=step)
        optimizer.step()


def masks(sparsifier):
    return [layer.mask.clone() for layer in sparsifier.layers]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def gradual(**settings):
    return GraNet(**{"sparsity": 0.9, "initial_sparsity": 0.5, "update_every": 4, "total_steps": 40} | settings)


@pytest.mark.filterwarnings("ignore:layer .* (has lost all its units|starts without a unit)")
@settings(max_examples=25, deadline=None)
@given(
    sparsity=st.floats(0.0, 0.99),
    initial=st.floats(0.0, 0.99),
    ratio=st.floats(0.0, 1.0),
    granularity=st.sampled_from(["unstructured", "block:2x3", "filter", "1:3"]),
)
def test_counts_are_exact_whatever_the_settings(sparsity, initial, ratio, granularity):
    method = gradual(
        sparsity=max(sparsity, initial), initial_sparsity=min(sparsity, initial), update_every=2, total_steps=8,
        regrow_ratio=ratio,
    )  # fmt: skip
    torch.manual_seed(0)
    model = granet.sparsify(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(24, 6)), granularity=granularity)
    optimizer = torch.optim.Adam(model.parameters())
    total = sum(owner.granularity.units(owner.weight.shape) for owner in sparse_weights(model).values())
    assume(kept_units(total, method.initial_sparsity) > 0)
    sparsifier = granet.Sparsifier(model, optimizer, method)
    for step in range(1, 7):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 1, 3)).square().sum().backward()
        before = [layer.kept for layer in sparsifier.layers]
        optimizer.step()
        if step % 2 == 0:
            kept = sum(layer.kept for layer in sparsifier.layers)
            assert kept == kept_units(total, method.sparsity_at(step))
        else:
            assert [layer.kept for layer in sparsifier.layers] == before
        for layer in sparsifier.layers:
            assert int(layer.mask.sum()) == layer.nnz
            assert not layer.weight[~layer.mask].any()


def test_the_dense_gradient_exists_only_in_the_step_of_an_update():
    model, optimizer, sparsifier = make(gradual())
    for step in range(1, 13):
        optimizer.zero_grad()
        assert sparsifier.needs_gradient == (step % 4 == 0)
        backward(model)
        dense = [bool(layer.weight.grad[~layer.mask].any()) for layer in sparsifier.layers]
        assert dense == [step % 4 == 0] * 2
        before = masks(sparsifier)
        optimizer.step()
        assert same(masks(sparsifier), before) == (step % 4 != 0)
        assert not any(
            bool(layer.weight.grad[~mask].any()) for layer, mask in zip(sparsifier.layers, before, strict=True)
        )


def test_accumulated_gradients_grow_as_one_large_batch_does():
    x = torch.randn(8, 2, 6, 6)
    outcome = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = granet.sparsify(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)))
        model.double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsifier = granet.Sparsifier(model, optimizer, gradual(update_every=2))
        for _ in range(4):
            optimizer.zero_grad()
            for part in x.double().chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
        outcome.append(masks(sparsifier))
    assert same(*outcome)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_skipped_by_the_gradient_scaler_is_no_step_and_no_update(fused):
    model, optimizer, sparsifier = make(
        gradual(update_every=2), optimizer=lambda p: torch.optim.Adam(p, lr=0.01, fused=fused)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(overflow):
        optimizer.zero_grad()
        x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1))
        loss = model(x).square().mean() * (float("inf") if overflow else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    step(False)
    assert sparsifier.step == 1
    assert sparsifier.needs_gradient
    before, weights = masks(sparsifier), [layer.weight.detach().clone() for layer in sparsifier.layers]
    step(True)
    assert sparsifier.step == 1
    assert sparsifier.needs_gradient
    assert same(masks(sparsifier), before)
    assert same([layer.weight for layer in sparsifier.layers], weights)
    step(False)
    assert sparsifier.step == 2
    assert not same(masks(sparsifier), before)
    assert all(not layer.weight[~layer.mask].any() for layer in sparsifier.layers)
    step(True)
    step(False)
    assert sparsifier.step == 3


def test_growth_under_a_fused_scaler_is_in_the_units_of_the_loss():
    growths = []
    for scaled in (False, True):
        model, optimizer, sparsifier = make(gradual(update_every=1), lambda p: torch.optim.SGD(p, lr=0.1, fused=True))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=scaled)
        scaler.scale(model(torch.ones(2, 2, 6, 6)).square().mean()).backward()
        scaler.step(optimizer)
        growths.append(sparsifier._tap.growth)
    torch.testing.assert_close(growths[0], growths[1])


def test_an_lr_schedule_and_param_groups_are_left_alone():
    torch.manual_seed(0)
    model = granet.sparsify(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)))
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "weight_decay": 0.1}], lr=0.5
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    sparsifier = granet.Sparsifier(model, optimizer, gradual(update_every=2))
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.1e-3, 0.5e-3])
    assert sparsifier.step == 6


def test_two_optimizers_share_one_sparsifier():
    torch.manual_seed(0)
    model = granet.sparsify(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2)))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(model[1].parameters(), lr=0.01)
    sparsifier = granet.Sparsifier(model, [first, second], gradual(update_every=2))
    for step in range(1, 9):
        model.zero_grad()
        model(torch.randn(3, 6)).square().sum().backward()
        first.step()
        assert sparsifier.step == step - 1
        second.step()
        assert sparsifier.step == step
        for layer in sparsifier.layers:
            assert not layer.weight[~layer.mask].any()
        assert not first.state[model[0].weight]["momentum_buffer"][~model[0].mask].any()
        assert not second.state[model[1].weight]["exp_avg_sq"][~model[1].mask].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [gradual(), GMP(update_every=4, total_steps=40)], ids=["GraNet", "GMP"])
def test_a_gradient_that_is_not_finite_stops_an_update_before_anything_changes(bad, method):
    model, optimizer, sparsifier = make(method)
    train(model, optimizer, 3)
    optimizer.zero_grad()
    backward(model)
    model[4].weight.grad[0, 0] = bad
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    kept = masks(sparsifier)
    with pytest.raises(granet.NonFiniteGradientError, match="layer '4': expected a finite gradient"):
        optimizer.step()
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before)
    assert same(masks(sparsifier), kept)
    assert sparsifier.step == 3
    train(model, optimizer, 1)
    assert sparsifier.step == 4


def test_a_layer_without_a_gradient_exchanges_nothing():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    model = granet.sparsify(Partly())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = granet.Sparsifier(model, optimizer, gradual(initial_sparsity=0.9, update_every=1))
    before = masks(sparsifier)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.used.mask, before[0])
    assert torch.equal(model.unused.mask, before[1])


@pytest.mark.parametrize("method", [gradual(), Static(sparsity=0.5, total_steps=40)], ids=["GraNet", "Static"])
@pytest.mark.parametrize("first", [0, 150], ids=["at once", "later"])
def test_a_penalty_on_the_weights_is_noticed_and_masked_from_then_on(method, first, recwarn):
    model, optimizer, sparsifier = make(method)

    def step(penalty):
        optimizer.zero_grad()
        backward(model)
        if penalty:  # the sum of all weights pulls dropped weights away from 0, too
            (1e-3 * sum(layer.weight.sum() for layer in sparsifier.layers)).backward()
        optimizer.step()

    for _ in range(first):
        step(penalty=False)
    assert not recwarn
    for _ in range(102):
        step(penalty=True)
    assert "layer '0' gets a gradient off its mask from something other than the layer" in str(recwarn[0].message)
    assert len(recwarn) == 1
    for _ in range(6):
        step(penalty=True)
        for layer in sparsifier.layers:
            assert not layer.weight[~layer.mask].any()
            assert not optimizer.state[layer.weight]["momentum_buffer"][~layer.mask].any()


def test_a_dense_checkpoint_loaded_into_a_bound_model_is_masked(recwarn):
    model, optimizer, sparsifier = make(gradual())
    dense = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))
    other = torch.optim.SGD(dense.parameters(), lr=0.1, momentum=0.9)
    train(dense, other, 2)
    model.load_state_dict(dense.state_dict())
    optimizer.load_state_dict(other.state_dict())
    for step in range(6):
        train(model, optimizer, 1, first=step)
        for layer in sparsifier.layers:
            assert not layer.weight[~layer.mask].any()
            assert not optimizer.state[layer.weight]["momentum_buffer"][~layer.mask].any()
    assert not recwarn


class Slow(torch.optim.SGD):
    """Keeps a second copy of the weights from its fifth step on, as Lookahead does."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["calls"] = state.get("calls", 0) + 1
                if state["calls"] == 5:
                    state["slow"] = parameter.detach().clone()
                elif state["calls"] % 5 == 0:
                    state["slow"].lerp_(parameter.detach(), 0.5)
                    parameter.data.copy_(state["slow"])


def test_state_that_appears_late_is_reset_too():
    model, optimizer, sparsifier = make(gradual(), lambda p: Slow(p, lr=0.1, momentum=0.9))
    for step in range(20):
        train(model, optimizer, 1, first=step)
        for layer in sparsifier.layers:
            assert not layer.weight[~layer.mask].any()
            if step >= 5:
                assert not optimizer.state[layer.weight]["slow"][~layer.mask].any()


def test_quantized_optimizer_state_is_refused():
    class Quantized(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["codes"] = torch.full_like(parameter, 128, dtype=torch.uint8)

    model, optimizer, _ = make(gradual(), lambda p: Quantized(p, lr=0.1))
    with pytest.raises(ValueError, match=r"Quantized keeps 'codes' of a sparse weight as torch.uint8"):
        train(model, optimizer, 1)


def test_a_compiled_optimizer_step_keeps_the_invariants(recwarn):
    torch._dynamo.reset()
    model, optimizer, sparsifier = make(gradual(update_every=2), torch.optim.Adam)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(8):
        optimizer.zero_grad()
        backward(model)
        step()
        for layer in sparsifier.layers:
            assert not layer.weight[~layer.mask].any()
            assert not optimizer.state[layer.weight]["exp_avg"][~layer.mask].any()
    assert sparsifier.step == 8
    assert not [w for w in recwarn if "granet" in str(w.message) or "layer" in str(w.message)]


def test_a_mask_only_method_refuses_weights_whose_products_are_dense():
    model = granet.sparsify(nn.Sequential(nn.Conv1d(4, 4, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="layer '0': GMP keeps values off the mask, which only"):
        granet.Sparsifier(model, optimizer, GMP(form="mask", total_steps=2000))


def test_lbfgs_resumes_bit_for_bit():
    def run(model, optimizer, steps, first=0):
        for step in range(first, first + steps):

            def closure(step=step):
                optimizer.zero_grad()
                return backward(model, seed=step)

            optimizer.step(closure)

    def lbfgs(parameters):
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    model, optimizer, sparsifier = make(gradual(), lbfgs)
    run(model, optimizer, 6)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()])
    run(model, optimizer, 5, first=6)
    again, optimizer2, sparsifier2 = make(gradual(), lbfgs)
    for target, state in zip((again, optimizer2, sparsifier2), saved, strict=True):
        target.load_state_dict(state)
    run(again, optimizer2, 5, first=6)
    assert same(model.state_dict().values(), again.state_dict().values())


def test_an_optimizer_that_steps_its_parent_makes_one_step():
    class Child(torch.optim.SGD):
        fail = False

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("out of memory")
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # its step runs hooks from now on, the child's too
    model, optimizer, sparsifier = make(gradual(update_every=2), lambda p: Child(p, lr=0.1))
    train(model, optimizer, 3)
    assert sparsifier.step == 3
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.fail = False
    before = masks(sparsifier)
    train(model, optimizer, 1, first=3)
    assert sparsifier.step == 4
    assert not same(masks(sparsifier), before)


def test_a_closure_may_be_a_keyword_only_argument():
    class Strict(torch.optim.SGD):
        def step(self, *, closure=None):
            return super().step(closure)

    model, optimizer, sparsifier = make(gradual(), lambda p: Strict(p, lr=0.1))
    optimizer.step(closure=lambda: backward(model))
    assert sparsifier.step == 1


def test_every_optimizer_delivers_its_gradient_whether_or_not_it_has_a_closure():
    model = granet.sparsify(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[1].parameters(), lr=0.1)
    sparsifier = granet.Sparsifier(model, [first, second], gradual(initial_sparsity=0.9, update_every=1))

    def closure():
        model.zero_grad()
        loss = model(torch.randn(3, 6)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        before = masks(sparsifier)
        first.step(closure)
        second.step()
        assert not any(torch.equal(a, b) for a, b in zip(before, masks(sparsifier), strict=True))


def test_an_optimizer_that_was_skipped_contributes_no_stale_growth():
    model = granet.sparsify(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(model[1].parameters(), lr=0.1)
    sparsifier = granet.Sparsifier(model, [first, second], gradual(initial_sparsity=0.9, update_every=1))
    for skip in (False, True):
        before = masks(sparsifier)
        model.zero_grad()
        model(torch.randn(3, 6)).square().sum().backward()
        if not skip:
            first.step()
        second.step()
        assert torch.equal(before[0], model[0].mask) == skip
        assert sparsifier._tap.growth is not None


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))])
def test_layers_have_the_model_s_own_names_behind_a_wrapper(wrap):
    model = granet.sparsify(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)))
    sparsifier = granet.Sparsifier(wrap(model), torch.optim.SGD(model.parameters(), lr=0.1), gradual())
    assert [layer.name for layer in sparsifier.layers] == ["0", "1"]


@pytest.mark.parametrize(
    "method",
    [
        gradual(sparsity=0.5, initial_sparsity=0.0, update_every=2),
        gradual(sparsity=0.75, initial_sparsity=0.5, update_every=2),
        RigL(sparsity=0.5, update_every=2, total_steps=40),
        SET(sparsity=0.6, update_every=2, total_steps=40),
        Static(sparsity=0.5, total_steps=40),
        GMP(sparsity=0.5, update_every=2, total_steps=40),
        GMP(sparsity=0.5, update_every=2, total_steps=40, form="mask", scope="layer"),
    ],
    ids=["GraNet-dense-start", "GraNet-sparser", "RigL", "SET", "Static", "GMP", "GMP-mask"],
)
def test_two_of_four_is_two_of_four(method):
    torch.manual_seed(0)
    model = granet.sparsify(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 8)), granularity="2:4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = granet.Sparsifier(model, optimizer, method)
    for _ in range(24):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    for layer in sparsifier.layers:
        kept = layer.mask.reshape(-1, 4).sum(1)
        assert int(kept.max()) <= 2
        assert method.sparsity != 0.5 or int(kept.min()) == 2


def test_a_layer_that_loses_all_its_units_is_named():
    torch.manual_seed(0)
    model = granet.sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    granet.Sparsifier(model, optimizer, GMP(sparsity=0.6, update_every=1, prune_until=1, total_steps=2))
    model(torch.randn(2, 8)).sum().backward()
    with pytest.warns(UserWarning, match="layer '1' has lost all its units at step 1"):
        optimizer.step()


def test_the_state_survives_a_file_and_continues_bit_for_bit():
    for method in (gradual(), RigL(update_every=3, total_steps=40), SET(update_every=3, total_steps=40)):
        model, optimizer, sparsifier = make(method)
        train(model, optimizer, 7)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()], file)
        train(model, optimizer, 9, first=7)

        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again, optimizer2, sparsifier2 = make(method, seed=5)
        for target, state in zip((again, optimizer2, sparsifier2), saved, strict=True):
            target.load_state_dict(state)
        assert sparsifier2.step == 7
        train(again, optimizer2, 9, first=7)
        assert same(masks(sparsifier), masks(sparsifier2))
        assert same(model.state_dict().values(), again.state_dict().values())
        assert sparsifier.state_dict()["layers"].keys() == sparsifier2.state_dict()["layers"].keys()


@pytest.mark.parametrize("loads_first", [True, False])
@pytest.mark.parametrize(
    "method", [gradual(), RigL(update_every=3, total_steps=40), ITOP(update_every=3, total_steps=40)], ids=str
)
def test_a_sparsifier_made_from_a_state_goes_on(method, loads_first):
    model, optimizer, sparsifier = make(method)
    train(model, optimizer, 9)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()])
    train(model, optimizer, 9, first=9)

    again, optimizer2 = make_model()
    with torch.no_grad():
        again[4].weight.add_(1)
    if not loads_first:
        sparsifier2 = granet.Sparsifier(again, optimizer2, method, seed=5, state=saved[2])
    again.load_state_dict(saved[0])
    optimizer2.load_state_dict(saved[1])
    if loads_first:
        sparsifier2 = granet.Sparsifier(again, optimizer2, method, seed=5, state=saved[2])
    assert sparsifier2.step == 9
    train(again, optimizer2, 9, first=9)
    assert same(masks(sparsifier), masks(sparsifier2))
    assert same(model.state_dict().values(), again.state_dict().values())
    if method.records_exploration:
        assert torch.equal(sparsifier.explored, sparsifier2.explored)


def test_a_state_that_comes_too_late_for_the_weights_is_warned_of():
    method = RigL(update_every=3, total_steps=40)
    model, optimizer, sparsifier = make(method)
    train(model, optimizer, 10)
    again, optimizer2 = make_model()
    again.load_state_dict(model.state_dict())
    late = granet.Sparsifier(again, optimizer2, method)  # its start cuts weights that were trained
    with pytest.warns(UserWarning, match="load the model and the optimizer after making it"):
        late.load_state_dict(sparsifier.state_dict())
    again.load_state_dict(model.state_dict())
    late.load_state_dict(sparsifier.state_dict())


def test_a_state_that_does_not_fit_makes_no_sparsifier():
    state = make(gradual())[2].state_dict()
    model, optimizer = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected the state of method RigL, got one of GraNet"):
        granet.Sparsifier(model, optimizer, RigL(update_every=3, total_steps=40), state=state)
    assert same(model.state_dict().values(), before.values())
    assert model[4].mask is None


def test_layers_that_start_without_a_unit_are_named():
    model = granet.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), granularity="filter")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="layer '2' starts without a unit: nothing passes it"):
        granet.Sparsifier(model, optimizer, Static(sparsity=0.95, distribution="uniform", total_steps=1))


def test_masks_are_packed_to_bits():
    _, _, sparsifier = make(gradual())
    sizes = {name: layer["mask"].numel() for name, layer in sparsifier.state_dict()["layers"].items()}
    assert sizes == {"0": -(-108 // 8), "4": 384 // 8}


def damaged(**changes):
    return lambda state: {**state, **changes}


def other_mask(change):
    def damage(state):
        layers = copy.deepcopy(state["layers"])
        change(layers["4"])
        return {**state, "layers": layers}

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged(method="RigL"), "expected the state of method GraNet, got one of RigL"),
        (damaged(version=9), "expected a Sparsifier state of version 1, got 9"),
        (lambda state: {k: v for k, v in state.items() if k != "step"}, "the Sparsifier state lacks step"),
        (damaged(step=-4), "expected a Sparsifier state of step 0 or later, got -4"),
        (damaged(layers=None), "the Sparsifier state has a NoneType as layers: it is damaged"),
        (damaged(settings=None), "the Sparsifier state has a NoneType as settings: it is damaged"),
        (damaged(generator=torch.zeros(3, dtype=torch.uint8)), "expected the random state of a generator"),
        (damaged(generator=torch.zeros(5056, dtype=torch.int16)), "expected the random state of a generator"),
        (other_mask(lambda la: la.pop("kept")), "layer '4' in the Sparsifier state lacks kept"),
        (other_mask(lambda la: la.update(mask=[1])), "layer '4' in the Sparsifier state has a list as mask"),
        (damaged(settings={"sparsity": 0.8}), "sparsity is 0.9 here and 0.8 in the state"),
        (damaged(layers={}), "expected masks for the 2 sparse layers of this model"),
        (other_mask(lambda la: la.update(shape=[4, 90])), r"layer '4': expected a mask of \[4, 96\], unstructured"),
        (
            other_mask(lambda la: la.update(granularity="2:4")),
            "layer '4': expected a mask of .*unstructured, got .*2:4",
        ),
        (other_mask(lambda la: la.update(mask=la["mask"][:-1])), "layer '4': expected 48 bytes of mask for 384 units"),
        (
            other_mask(lambda la: la["mask"].bitwise_xor_(1)),
            "layer '4': expected .* kept units, got .*: the mask is damaged",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_is_changed(damage, message):
    model, optimizer, sparsifier = make(gradual())
    train(model, optimizer, 5)
    state = sparsifier.state_dict()
    before = masks(sparsifier)
    with pytest.raises(ValueError, match=message):
        sparsifier.load_state_dict(damage(state))
    assert same(masks(sparsifier), before)
    assert sparsifier.step == 5


@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor:UserWarning")
def test_the_fast_path_of_an_encoder_does_not_meet_stored_values():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    granet.sparsify(layer, exclude=["self_attn"])
    optimizer, settings = torch.optim.SGD(layer.parameters(), lr=0.1), {"update_every": 1, "prune_until": 1}
    with pytest.raises(ValueError, match=r"layer 'linear1': GMP keeps values off the mask, which the fast path of"):
        granet.Sparsifier(layer, optimizer, GMP(form="mask", sparsity=0.9, total_steps=3, **settings))
    granet.Sparsifier(layer, optimizer, GMP(sparsity=0.5, total_steps=3, **settings))
    x = torch.randn(2, 3, 8)
    layer(x).sum().backward()
    optimizer.step()
    slow = layer.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), slow)


def test_an_optimizer_of_another_model_is_refused():
    model = granet.sparsify(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="the optimizer does not hold the weight of layer '1'"):
        granet.Sparsifier(model, torch.optim.SGD(model[0].parameters(), lr=0.1), gradual())
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="holds no sparse weight of the model: leave it out"):
        granet.Sparsifier(model, [torch.optim.SGD(model.parameters(), lr=0.1), other], gradual())
    assert model[0].mask is None


def test_a_model_without_sparse_layers_or_bound_already_is_refused():
    plain = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="no layer to sparsify"):
        granet.Sparsifier(plain, torch.optim.SGD(plain.parameters(), lr=0.1), gradual())
    for optimizer in (None, plain.parameters(), []):
        with pytest.raises(ValueError, match=r"expected a torch.optim.Optimizer or a list of them"):
            granet.Sparsifier(plain, optimizer, gradual())
    model, optimizer, sparsifier = make(gradual())
    with pytest.raises(ValueError, match="expected a method such as"):
        granet.Sparsifier(model, optimizer, GraNet)
    with pytest.raises(ValueError, match="layer '0' is bound to a Sparsifier already"):
        granet.Sparsifier(model, optimizer, gradual())
    with pytest.raises(TypeError, match="copy the model, make a new optimizer"):
        copy.deepcopy(sparsifier)


def test_a_count_that_cannot_be_reached_is_refused():
    model = granet.sparsify(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected a sparsity that keeps one unit or more, got 0\.99 of 4 units"):
        granet.Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), Static(sparsity=0.99, total_steps=1))
    assert model.mask is None


def test_the_table_lists_every_layer_and_the_sum():
    _, _, sparsifier = make(Static(sparsity=0.75, total_steps=1, distribution="uniform"))
    runs = "  dense" if library.unavailable() else ""  # without the library there is no choice to wait for
    assert str(sparsifier).splitlines() == [
        "Static at step 0: sparsity 75.00%, target 75.00%",
        "layer  shape    granularity   kept  weights  sparsity  implementation  speed-up  wins from",
        "0      6x2x3x3  unstructured    27      108    75.00%" + runs,
        "4      4x96     unstructured    96      384    75.00%" + runs,
        "all                            123      492    75.00%",
    ]
    assert [row["nnz"] for row in sparsifier.table()] == [27, 96]


def test_the_table_says_what_ran_and_how_fast():
    model, _, sparsifier = make(Static(sparsity=0.75, total_steps=1, distribution="uniform"))
    assert {row["speedup"] for row in sparsifier.table()} == {None}
    for name in ["dense"] if library.unavailable() else ["native", "dense"]:
        with plan.use(name):
            backward(model)
        assert [row["implementation"] for row in sparsifier.table()] == [name] * 2
        assert str(sparsifier).splitlines()[2].endswith(name)


@pytest.mark.skipif(library.unavailable() is not None, reason="no native library")
def test_the_table_says_from_where_on_native_code_wins_and_what_finding_out_has_cost(monkeypatch):
    model, _, sparsifier = make(Static(sparsity=0.75, total_steps=1, distribution="uniform"))
    with plan.use("native"):
        backward(model)
    for layer in sparsifier.layers:
        for note in layout_of(layer.mask).last.values():
            monkeypatch.setattr(note.site, "times", Times())
    assert {row["break_even"] for row in sparsifier.table()} == {None}
    for layer in sparsifier.layers:
        for note in layout_of(layer.mask).last.values():
            note.site.times.add("dense", note.bucket, 1.0)
            note.site.times.add("native", note.bucket, 0.5)
    assert {row["break_even"] for row in sparsifier.table()} == {0.5}  # twice the time at twice the density, at most
    for layer in sparsifier.layers:
        for note in layout_of(layer.mask).last.values():
            note.site.times.add("native", bucket_of(0.5), 2.0)
    assert [row["break_even"] for row in sparsifier.table()] == [pytest.approx(1 - (0.25 + 0.25 / 3))] * 2
    monkeypatch.setattr(plan, "summary", lambda: "plan: little")
    with plan.use("measured"):
        lines = str(sparsifier).splitlines()
    assert [line.split()[-3:] for line in lines[2:4]] == [["native", "2.00x", "67%"]] * 2
    assert lines[-1] == "plan: little"


def test_the_dense_state_dict_hides_stored_values():
    model, optimizer, sparsifier = make(GMP(form="mask", sparsity=0.5, update_every=2, prune_until=4, total_steps=8))
    train(model, optimizer, 6)
    dense = sparsifier.dense_state_dict()
    assert model[4].weight[~model[4].mask].any()
    assert int((dense["4.weight"] != 0).sum()) == sparsifier.layers[1].nnz
    assert list(dense) == list(model.state_dict())
    x = torch.randn(2, 2, 6, 6)
    plain = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))
    plain.load_state_dict(dense)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


def test_exploration_is_the_share_of_units_ever_kept():
    model, optimizer, sparsifier = make(ITOP(sparsity=0.8, update_every=2, total_steps=20))
    ever = sparsifier.kept()
    assert sparsifier.exploration == pytest.approx(0.2, abs=0.01)
    for step in range(12):
        train(model, optimizer, 1, first=step)
        ever |= sparsifier.kept()
    assert sparsifier.exploration == pytest.approx(float(ever.float().mean()))
    assert sparsifier.exploration > 0.25
    state = sparsifier.state_dict()
    again = granet.Sparsifier(*make_model(), ITOP(sparsity=0.8, update_every=2, total_steps=20), state=state)
    assert again.exploration == sparsifier.exploration
    with pytest.raises(ValueError, match="exploration is recorded by ITOP only"):
        make(gradual())[2].exploration  # noqa: B018


@pytest.mark.parametrize(
    "method", [gradual(update_every=2), SET(sparsity=0.5, update_every=2, total_steps=40)], ids=str
)
def test_the_default_device_changes_nothing(method):
    def run(device):
        torch.manual_seed(0)
        x = torch.randn(8, 2, 6, 6)
        model = granet.sparsify(nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.set_default_device(device)
        try:
            sparsifier = granet.Sparsifier(model, optimizer, method)
            for _ in range(9):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            sparsifier.load_state_dict(sparsifier.state_dict())
        finally:
            torch.set_default_device(None)
        return [sparsifier.kept(), *(p.detach() for p in model.parameters())]

    assert same(run("meta"), run(None))
