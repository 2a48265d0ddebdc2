import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import granet
from granet.convert import sparse_weights
from granet.masked import MaskedParameter
from granet.methods import GraNet, Static
from granet.modules import SparseConv2d, SparseLinear


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(8 * 16, 16), nn.Linear(16, 10))

    def forward(self, x):
        return self.classifier(self.features(x))


ALL = ["features.0", "features.2", "classifier.1", "classifier.2"]


def test_layers_are_converted_in_place_and_keep_their_parameters():
    model = Net()
    conv, weight, names = model.features[0], model.features[0].weight, list(model.state_dict())
    calls = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert granet.sparsify(model) is model
    assert type(model.features[0]) is SparseConv2d
    assert type(model.classifier[1]) is SparseLinear
    assert model.features[0] is conv
    assert conv.weight is weight
    assert list(model.state_dict()) == names
    granet.Sparsifier(model, optimizer, Static(sparsity=0.5, total_steps=1))
    model(torch.randn(1, 3, 8, 8))
    assert calls == [1]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("classifier", ALL[:2]),
        (["classifier.2", "features.0"], ["features.2", "classifier.1"]),
        ("*.0", ALL[1:]),
        (nn.Conv2d, ALL[2:]),
        ([nn.Linear, "features.0"], ["features.2"]),
        ([], ALL),
    ],
    ids=str,
)
def test_exclude_by_name_glob_and_type(exclude, left):
    assert list(sparse_weights(granet.sparsify(Net(), exclude=exclude))) == left


def tied():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    return model


def frozen():
    model = Net()
    model.features[0].weight.requires_grad_(False)
    return model


def bound():
    model = granet.sparsify(Net())
    granet.Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), Static(total_steps=1))
    return model


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.Sequential(nn.ReLU()), {}, "no layer to sparsify: expected a model with Linear or Conv layers"),
        (Net(), {"exclude": [nn.Conv2d, nn.Linear]}, "no layer to sparsify"),
        (
            Net(),
            {"exclude": "clasifier.1"},
            "'clasifier.1' matches no Linear or Conv layer; did you mean classifier.1",
        ),
        (Net(), {"exclude": [3]}, "exclude: expected names, globs or module types, got 3"),
        (Net(), {"granularity": "block:16x16"}, r"layer 'features.0' \(Conv2d\): .*16"),
        (Net(), {"granularity": "2:4", "exclude": "classifier"}, r"layer 'features.0' \(Conv2d\): .*4"),
        (Net(), {"granularity": "blok:2x2"}, "blok"),
        (tied(), {}, r"layer '1' \(Linear\) shares its weight \(0.weight = 1.weight\): exclude it"),
        (nn.Sequential(nn.LazyLinear(4)), {}, r"layer '0' \(LazyLinear\) is lazy and has no weight yet"),
        (nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), {}, "has a parametrized weight"),
        (nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))), {}, "has a parametrized weight"),
        (frozen(), {}, r"layer 'features.0' \(Conv2d\) is frozen"),
        (bound(), {}, r"layer 'features.0' \(SparseConv2d\) is bound to a Sparsifier"),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), {"granularity": "filter"}, "transposed convolution"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_sparse_is_named_and_nothing_is_changed(model, settings, message):
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        granet.sparsify(model, **settings)
    assert [type(module) for module in model.modules()] == types


def test_one_layer_used_twice_is_one_layer():
    shared = nn.Linear(4, 4)
    model = granet.sparsify(nn.Sequential(shared, nn.ReLU(), shared))
    assert list(sparse_weights(model)) == ["0"]


def test_a_single_layer_is_a_model_too():
    layer = granet.sparsify(nn.Linear(4, 4))
    sparsifier = granet.Sparsifier(layer, torch.optim.SGD(layer.parameters(), lr=0.1), Static(total_steps=1))
    assert sparsifier.layers[0].name == ""
    assert "(model)" in str(sparsifier)


def test_converting_again_changes_the_granularity():
    model = granet.sparsify(Net())
    granet.sparsify(model, granularity="filter", exclude="classifier")
    assert [str(owner.granularity) for owner in sparse_weights(model).values()] == ["filter"] * 2 + ["unstructured"] * 2


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        self.head = nn.Linear(8, 3)

    def forward(self, x, context):
        return self.head(self.attention(x, context, context)[0].mean(1))


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_bare_layer_without_a_sparse_class_is_named_like_its_module():
    assert list(sparse_weights(granet.sparsify(nn.Conv1d(4, 4, 3)))) == [""]


MASKED = {
    "attention": (Attention(), (torch.randn(2, 3, 8),) * 2, ["attention.in_proj", "attention.out_proj", "head"]),
    "cross-attention": (
        Attention(kdim=6, vdim=6),
        (torch.randn(2, 3, 8), torch.randn(2, 4, 6)),
        ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj", "head"],
    ),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3)), (torch.randn(2, 4, 9),), ["0"]),
    "conv3d": (nn.Sequential(nn.Conv3d(2, 4, 2)), (torch.randn(2, 2, 3, 3, 3),), ["0"]),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 2)), (torch.randn(2, 4, 3, 3),), ["0"]),
    "subclass": (nn.Sequential(Scaled(6, 6)), (torch.randn(2, 6),), ["0"]),
}


@pytest.mark.parametrize(("model", "inputs", "names"), MASKED.values(), ids=MASKED)
def test_weights_that_cannot_be_swapped_are_sparse_by_a_masked_gradient(model, inputs, names):
    granet.sparsify(model)
    assert list(sparse_weights(model)) == names
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = GraNet(sparsity=0.7, update_every=3, prune_until=9, total_steps=20)
    sparsifier = granet.Sparsifier(model, optimizer, method)
    for step in range(1, 13):
        optimizer.zero_grad()
        model(*inputs).square().sum().backward()
        dense = any(bool(layer.weight.grad[~layer.mask].any()) for layer in sparsifier.layers)
        assert dense <= (step % 3 == 0)
        optimizer.step()
        for layer in sparsifier.layers:
            assert not layer.weight[~layer.mask].any()
            assert not optimizer.state[layer.weight]["exp_avg"][~layer.mask].any()
    assert sparsifier.nnz == round(0.3 * sparsifier.numel)
    masked = [layer for layer in sparsifier.layers if isinstance(layer.owner, MaskedParameter)]
    assert all(layer.implementation == "dense, masked gradient" for layer in masked)
    sparsifier.remove()
    optimizer.zero_grad()
    model(*inputs).square().sum().backward()
    assert any(bool((layer.weight.grad != 0)[layer.weight == 0].any()) for layer in sparsifier.layers)


def test_the_attention_of_a_vision_transformer_trains_compiled():
    torch._dynamo.reset()
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    granet.sparsify(layer)
    names = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert list(sparse_weights(layer)) == names
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    method = GraNet(sparsity=0.5, initial_sparsity=0.5, update_every=2, total_steps=20)
    sparsifier = granet.Sparsifier(layer, optimizer, method)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(5):
        optimizer.zero_grad()
        compiled(torch.randn(2, 3, 8)).square().sum().backward()
        optimizer.step()
        assert all(not la.weight[~la.mask].any() for la in sparsifier.layers)
