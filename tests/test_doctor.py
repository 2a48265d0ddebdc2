import pytest
import torch

from granet.doctor import examine


def test_resnet50_as_in_the_papers():
    found = examine("resnet50", num_classes=1000)
    assert sum(layer.weights for layer in found.layers) == 25_502_912
    assert found.macs == 4_089_184_256
    assert [layer.name for layer in found.layers if layer.erk == 1.0] == ["layer1.0.conv1"]
    assert found.flops_ratio["erk"] == pytest.approx(0.242, abs=1e-3)
    assert found.flops_ratio["uniform"] == pytest.approx(0.1, abs=1e-3)


def test_layers_that_do_not_fit_are_dense_and_say_why():
    found = examine("digits-cnn", granularity="block:64x64")
    reasons = {layer.name: layer.problem for layer in found.layers}
    assert "64 x 64" in str(next(iter(reasons.values())))
    assert all((layer.erk is None) == (layer.problem is not None) for layer in found.layers)


def test_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    examine("mlp")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "resnt50"}, "unknown model"),
        ({"model_name": "mlp", "sparsity": 1.0}, "sparsity"),
        ({"model_name": "mlp", "granularity": "blocks"}, "granularity"),
    ],
    ids=["model", "sparsity", "granularity"],
)
def test_bad_request_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        examine(**arguments)
