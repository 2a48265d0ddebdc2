"""sparsify(): declare which weights of a model are to be sparse, and at what granularity."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from granet import fusion, masked, modules
from granet.granularity import Granularity, Unstructured, parse
from granet.modules import SPARSE_CLASS, SparseLayer
from granet.names import suggestion

Exclude = str | type[nn.Module]


def sparsify(
    model: nn.Module,
    granularity: str | Granularity = "unstructured",
    exclude: Exclude | Iterable[Exclude] = (),
    fuse: bool = True,
) -> nn.Module:
    """Make the Linear and Conv weights of `model` ready to be sparse, in place.

    nn.Linear and nn.Conv2d become SparseLinear and SparseConv2d: the same objects with the same Parameters and
    state_dict keys. The weights of nn.MultiheadAttention, of other convolutions and of subclasses of these layers are
    declared too; they keep their dense products and get a masked gradient. Until a Sparsifier binds them, all compute
    what they did. A layer that is sparse already gets the new granularity, or is left as it is where it is excluded.
    Batch norms with the ReLUs behind them, and max-pools, run natively where that is faster; see granet.fusion.

    Args:
        model: any module; may be a single layer.
        granularity: "unstructured", "block:ROWSxCOLS", "N:M", "filter", or a Granularity.
        exclude: layers that stay dense: names ("classifier" takes in "classifier.0"), globs ("*.downsample.0") or
            module types.
        fuse: whether nn.BatchNorm2d, nn.MaxPool2d, nn.Sequential and torchvision's residual blocks become granet's own
            subclasses, which compute the same.

    Returns:
        `model`.

    Raises:
        ValueError: nothing to sparsify; the granularity does not fit a layer; an exclude that matches nothing; a layer
            that is lazy, parametrized, frozen, tied to another or bound already. The model is unchanged then.
    """
    granularity = parse(granularity)
    patterns: list[Exclude] = [exclude] if isinstance(exclude, str | type) else list(exclude)
    _check_patterns(model, patterns)
    targets = [(name, m) for name, m in _candidates(model) if not any(_excluded(name, m, p) for p in patterns)]
    if not targets:
        raise ValueError(
            f"no layer to sparsify: expected a model with Linear or Conv layers beyond exclude={patterns}, "
            f"got {type(model).__name__}"
        )
    shared = _shared_parameters(model)
    for name, module in targets:
        _check(name, module, granularity, shared)
    for _, module in targets:
        _declare(module, granularity)
    if fuse:
        fusion.fuse(model)
    return model


def sparse_weights(model: nn.Module) -> dict[str, SparseLayer | masked.MaskedParameter]:
    """The weights of `model` that are declared sparse, by name, in the order of named_modules().

    The names are those of the model itself, whether or not it is compiled or wrapped for data parallelism.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    found: dict[str, SparseLayer | masked.MaskedParameter] = {}
    for name, module in model.named_modules():
        name = f"{name}.".replace("_orig_mod.", "").removesuffix(".")
        if isinstance(module, SparseLayer):
            found[name] = module
        for path, parameter in masked.attached(module).items():
            found[f".{name}.{path}".removesuffix("_weight").removesuffix(".weight").lstrip(".")] = parameter
    return found


def weight_paths(module: nn.Module) -> list[str]:
    """Paths of the weights of one layer that sparsify() would make sparse, e.g. ["weight"]; [] for any other module."""
    if isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return [name for name in names if getattr(module, name) is not None] + ["out_proj.weight"]
    return ["weight"] if isinstance(module, nn.Linear | _ConvNd) else []


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside_attention: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside_attention.add(module.out_proj)
        if weight_paths(module) and module not in inside_attention:
            yield name, module


def _excluded(name: str, module: nn.Module, pattern: Exclude) -> bool:
    if isinstance(pattern, str):
        return name == pattern or name.startswith(pattern + ".") or fnmatch.fnmatchcase(name, pattern)
    return isinstance(module, pattern)


def _check_patterns(model: nn.Module, patterns: list[Exclude]) -> None:
    candidates = list(_candidates(model))
    for pattern in patterns:
        if not isinstance(pattern, str | type):
            raise ValueError(f"exclude: expected names, globs or module types, got {pattern!r}")
        if not any(_excluded(name, module, pattern) for name, module in candidates):
            hint = suggestion(str(pattern), [name for name, _ in candidates])
            raise ValueError(f"exclude: {pattern!r} matches no Linear or Conv layer{hint}")


def _shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    # One module under two names is not a tied weight: it is one layer, used twice.
    modules_seen: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            modules_seen.setdefault(id(parameter), set()).add(id(module))
    return {key: owners for key, owners in names.items() if len(modules_seen[key]) > 1}


def _check(name: str, module: nn.Module, granularity: Granularity, shared: dict[int, list[str]]) -> None:
    label = f"layer '{name}' ({type(module).__name__})" if name else type(module).__name__
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(f"{label} is lazy and has no weight yet: run one batch through the model first, or exclude it")
    if parametrize.is_parametrized(module) or any(
        path not in dict(module.named_parameters()) for path in weight_paths(module)
    ):
        raise ValueError(
            f"{label} has a parametrized weight: expected a plain Parameter; remove the parametrization or exclude it"
        )
    if isinstance(module, _ConvTransposeNd) and not isinstance(granularity, Unstructured):
        raise ValueError(
            f"{label}: a transposed convolution can only be unstructured, got granularity {granularity}; exclude it"
        )
    owners = [module] if isinstance(module, SparseLayer) else list(masked.attached(module).values())
    if any(owner.mask is not None for owner in owners):
        raise ValueError(f"{label} is bound to a Sparsifier: call its remove() first")
    for path in weight_paths(module):
        weight = module.get_parameter(path)
        if id(weight) in shared:
            raise ValueError(f"{label} shares its weight ({' = '.join(shared[id(weight)])}): exclude it")
        if not weight.requires_grad:
            raise ValueError(f"{label} is frozen (requires_grad=False): expected a weight that is trained; exclude it")
        try:
            granularity.units(tuple(weight.shape))
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None


def _declare(module: nn.Module, granularity: Granularity) -> None:
    if type(module) in SPARSE_CLASS or isinstance(module, SparseLayer):
        modules.convert(module, granularity)
    else:
        for path in weight_paths(module):
            masked.attach(module, path, granularity)
