import pytest
import torch
from torch import nn
from training_support import small_config

from granet.config import SGD, AdamW
from granet.models import create_model
from granet.session import build_optimizer, build_session, parameter_groups
from granet_kernels import plan


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2))


def test_norms_and_biases_do_not_decay():
    model = network()
    decayed, spared = parameter_groups(model, 0.1, decay_norm_and_bias=False)
    assert decayed["weight_decay"] == 0.1
    assert spared["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[4].weight)}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_everything_decays_where_asked():
    model = network()
    (group,) = parameter_groups(model, 0.1, decay_norm_and_bias=True)
    assert len(group["params"]) == len(list(model.parameters()))


def test_frozen_and_tied_parameters_are_held_once_or_not_at_all():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    decayed, spared = parameter_groups(model, 0.1, decay_norm_and_bias=False)
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight)]
    assert len(spared["params"]) == 2


def test_optimizers_get_their_settings():
    sgd = build_optimizer(network(), SGD(lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.1))
    assert isinstance(sgd, torch.optim.SGD)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0.8, True, 0.1)
    adamw = build_optimizer(network(), AdamW(lr=0.01, betas=(0.8, 0.9)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[1]["weight_decay"] == 0.0
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)


def test_steps_count_accumulated_batches():
    session = build_session(small_config(batch_size=100, accumulate=4, epochs=3))
    batches = -(-session.data.train.examples // 100)
    assert session.total_steps == 3 * -(-batches // 4)
    assert session.method.total_steps == session.total_steps


def test_weights_are_drawn_from_the_seed():
    first, second, other = (build_session(small_config(seed=seed)).model for seed in (3, 3, 4))
    assert torch.equal(first[1].weight, second[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)


def test_weights_of_a_session_fit_the_dense_model():
    session = build_session(small_config())
    create_model("mlp", num_classes=10, in_channels=1, image_size=8).load_state_dict(session.weights())
    assert sum(int(mask.sum()) for mask in session.masks().values()) == session.sparsifier.nnz


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_float16_scales_the_loss_on_cuda():
    assert build_session(small_config(device="cuda", precision="float16")).scaler.is_enabled()


def test_the_plan_is_the_configurations_or_stays():
    with plan.use("native"):
        build_session(small_config())
        assert plan.mode() == "rule"
    with plan.use("native"):
        build_session(small_config(plan=None))
        assert plan.mode() == "native"
        build_session(small_config(plan="dense"))
        assert plan.mode() == "dense"
        with pytest.raises(ValueError, match="plan: expected measured, rule, native, dense or a file"):
            build_session(small_config(plan="sparse"))
