"""GraNet against events worked out by hand.

Two layers, `a` of 2 x 3 and `b` of 2 x 2 weights, N = 10. The optimizer's rate is 0 and the test writes weights and
gradients itself, so every event follows from the numbers below.

    sparsity 0 -> .6, an event every 2 steps, pruning until step 4 of 8
    s(2) = .6 - .6 (1 - 2/4)^3 = .525, keep round(4.75) = 5;    s(4) = .6, keep 4
    r(2) = .005 + .2475 (1 + cos(pi/4)) = .4275;    r(4) = .2525;    r(6) = .005 + .2475 (1 - cos(pi/4)) = .0775
"""

import pytest
import torch
from torch import nn

import granet
from granet.methods import GraNet

A = torch.tensor([[0.9, -0.1, 0.5], [0.05, -0.8, 0.3]])
B = torch.tensor([[0.7, 0.2], [-0.6, 0.4]])


class HandWorked:
    def __init__(self, **settings):
        self.model = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        granet.sparsify(self.model)
        self.write(a=A, b=B)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)
        defaults = {"sparsity": 0.6, "update_every": 2, "prune_until": 4, "total_steps": 8}
        self.sparsifier = granet.Sparsifier(self.model, self.optimizer, GraNet(**defaults | settings))

    @torch.no_grad()
    def write(self, **weights):
        for name, values in weights.items():
            self.model[name].weight.copy_(values)

    def step(self, a, b):
        for name, gradient in {"a": a, "b": b}.items():
            weight = self.model[name].weight
            weight.grad = torch.tensor(gradient, dtype=torch.float32).reshape(weight.shape)
        self.optimizer.step()

    def masks(self):
        return {layer.name: layer.mask.flatten().nonzero().flatten().tolist() for layer in self.sparsifier.layers}

    def weights(self):
        return [value for layer in self.sparsifier.layers for value in layer.weight.flatten().tolist()]


ZERO = ([0] * 6, [0] * 4)


def test_every_event_is_the_one_worked_out_on_paper():
    net = HandWorked()
    net.step([1] * 6, [1] * 4)
    assert net.masks() == {"a": [0, 1, 2, 3, 4, 5], "b": [0, 1, 2, 3]}

    # Step 2. Kept by |w| over both layers: a0 .9, a4 .8, b0 .7, b2 .6, a2 .5. Layer a drops ceil(.4275 * 3) = 2: a2
    # and a4; it grows a4 (|g| 5; it survives with its value) and a3 (3). Layer b drops ceil(.855) = 1: b2; it grows b1,
    # which ties with b3 (|g| 4) and has the lower index.
    net.step([9, 1, 2, 3, -5, 0], [0, -4, 1, 4])
    assert net.masks() == {"a": [0, 3, 4], "b": [0, 1]}
    assert net.weights() == pytest.approx([0.9, 0, 0, 0, -0.8, 0, 0.7, 0, 0, 0])

    net.step([1] * 6, [1] * 4)
    net.write(a=torch.tensor([[0.9, 0, 0], [0.2, -0.8, 0]]), b=torch.tensor([[0.7, 0.3], [0, 0]]))

    # Step 4. One too many: the smallest of .9 .2 .8 .7 .3 goes, a3. Then both layers exchange ceil(.2525 * 2) = 1:
    # a drops a4 and grows a1 (tied with a2); b drops b1 and grows b2.
    net.step([0, 1, 1, 0, 0, 0], [0, 0, 7, 0])
    assert net.masks() == {"a": [0, 1], "b": [0, 2]}
    assert net.weights() == pytest.approx([0.9, 0, 0, 0, 0, 0, 0.7, 0, 0, 0])

    net.step([1] * 6, [1] * 4)
    net.write(a=torch.tensor([[0.9, 0.6, 0], [0, 0, 0]]), b=torch.tensor([[0.7, 0], [0.1, 0]]))

    # Step 6. No pruning any more; ceil(.0775 * 2) = 1: a drops a1, grows a5; b drops b2 and grows it again.
    net.step([0, 0, 0, 0, 0, 3], [0, 2, 5, 1])
    assert net.masks() == {"a": [0, 5], "b": [0, 2]}
    assert net.weights() == pytest.approx([0.9, 0, 0, 0, 0, 0, 0.7, 0, 0.1, 0])

    # Step 8 is the last: nothing would train what it grew.
    net.step([1] * 6, [1] * 4)
    net.step([9] * 6, [9] * 4)
    assert net.masks() == {"a": [0, 5], "b": [0, 2]}


def test_regrown_zero_restarts_a_unit_dropped_and_grown_in_one_event():
    net = HandWorked(regrown="zero")
    net.step([1] * 6, [1] * 4)
    net.step([9, 1, 2, 3, -5, 0], [0, -4, 1, 4])
    assert net.masks() == {"a": [0, 3, 4], "b": [0, 1]}
    assert net.weights() == pytest.approx([0.9, 0, 0, 0, 0, 0, 0.7, 0, 0, 0])


def test_a_unit_cut_by_the_pruning_and_grown_again_restarts_at_zero():
    net = HandWorked()
    net.step(*ZERO)
    # b3 (.4) is cut by the global pruning, then has the largest gradient of its layer.
    net.step([0] * 6, [0, 0, 0, 9])
    assert net.masks()["b"] == [0, 3]
    assert net.model["b"].weight[1, 1] == 0


def test_momentum_is_kept_by_survivors_and_zero_elsewhere():
    net = HandWorked()
    net.step([1] * 6, [1] * 4)
    net.step([9, 1, 2, 3, -5, 0], [0, -4, 1, 4])
    momentum = net.optimizer.state[net.model["a"].weight]["momentum_buffer"].flatten()
    # a0 and a4 survive: .9 * 1 + g; a3 is new.
    assert momentum.tolist() == pytest.approx([9.9, 0, 0, 0, -4.1, 0])


def test_regrow_until_prune_end_stops_with_the_pruning():
    method = GraNet(regrow_until="prune_end", update_every=2, prune_until=4, total_steps=8)
    assert [step for step in range(9) if method.exchanges(step)] == [2, 4]
    method = GraNet(update_every=2, prune_until=4, total_steps=8)
    assert [step for step in range(9) if method.exchanges(step)] == [2, 4, 6]


def test_a_prune_end_between_two_updates_gets_a_pruning_of_its_own():
    method = GraNet(sparsity=0.9, update_every=3, prune_until=5, total_steps=20)
    assert [step for step in range(21) if method.prunes(step)] == [3, 5]
    assert [step for step in range(21) if method.exchanges(step)] == [3, 6, 9, 12, 15, 18]
    assert [step for step in range(21) if method.needs_gradient(step)] == [3, 6, 9, 12, 15, 18]
    assert method.sparsity_at(5) == 0.9


def test_a_part_of_a_very_short_run_is_at_least_one_step():
    method = GraNet(sparsity=0.9, update_every="2%", prune_until="50%", total_steps=1)
    method.check_times()
    assert [step for step in range(3) if method.prunes(step)] == [1]


def test_neuroregeneration_ratio_is_the_paper_s_cosine():
    method = GraNet(total_steps=1000)
    assert [method.ratio_at(step) for step in (0, 500, 1000)] == pytest.approx([0.5, 0.2525, 0.005])


def test_the_number_exchanged_is_rounded_up_once():
    method = GraNet(total_steps=10)
    assert method.drop_count(0.1, 30) == 3  # 0.1 * 30 is 3.0000000000000004
    assert method.drop_count(0.1, 31) == 4
    assert method.drop_count(0.5, 0) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"GraNet.sparsity: expected a number in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"GraNet.sparsity: expected a number in \[0, 1\), got -0.1"),
        ({"initial_sparsity": 0.95}, "GraNet.initial_sparsity: expected at most the final sparsity 0.9, got 0.95"),
        ({"regrown": "kept"}, "GraNet.regrown: expected 'keep' or 'zero', got 'kept'"),
        ({"distribution": "ekr"}, "GraNet.distribution: expected one of uniform, er, erk, got 'ekr'"),
        ({"regrow_ratio": 1.5}, r"GraNet.regrow_ratio: expected a number in \[0, 1\], got 1.5"),
        ({"total_steps": 0}, "GraNet.total_steps: expected a positive number of steps, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GraNet(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "GraNet.total_steps: expected the optimizer steps of the whole run, got None"),
        (
            {"total_steps": 10, "update_every": 2, "prune_until": 0},
            "GraNet.prune_until: expected 1 steps or more, got 0",
        ),
        ({"total_steps": 10, "update_every": 0}, "GraNet.update_every: expected 1 steps or more, got 0"),
        ({"total_steps": 10, "update_every": "0%"}, "GraNet.update_every: expected 1 steps or more, got '0%'"),
        ({"total_steps": 10, "update_every": 11}, "GraNet.update_every: expected a time within the run of 10 steps"),
        ({"total_steps": 10, "update_every": "1 epochs"}, "GraNet.update_every: expected steps_per_epoch"),
    ],
)
def test_times_that_do_not_fit_the_run_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GraNet(**settings).check_times()
