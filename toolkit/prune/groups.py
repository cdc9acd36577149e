"""What may be pruned: in a model by its layers, in an optimizer by the marks of its groups."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed
from torch import Tensor, nn

from toolkit.log import get_logger
from toolkit.prune.patterns import WEIGHT, n_of_m

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention
_SHOWN = 8  # parameters that a message names one by one


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' `Conv1D`, a linear layer with its weight transposed; by name, without the import."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    """Attributes of the weights of one convolution, linear or attention layer; none of other modules."""
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION
    return ("weight",) if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or _is_conv1d(module) else ()


def _layer_weights(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Attribute and tensor of a layer's weights; without those that are computed (see `computed_names`)."""
    for name in _weight_names(module):
        weight = module._parameters.get(name)
        if weight is not None:
            yield name, weight


def _embeddings(model: nn.Module) -> dict[int, str]:
    """Name of each embedding table by the tensor's id."""
    return {
        id(module.weight): f"{name}.weight".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }


def prunable_names(model: nn.Module, pattern: str = WEIGHT, *, ends: bool = False) -> set[str]:
    """Names, as in `named_parameters()`, of the weights that pruning is for; see `left_dense` for N:M.

    These are the weights of convolution and linear layers, stem and classifier included, of transformers' `Conv1D` and
    of the projections in `nn.MultiheadAttention`. Embeddings, recurrent layers, norms, biases and a model's bare
    parameters are not; nor is a linear layer's weight that is an embedding's too (see `tied_names`).
    """
    weights = {id(weight) for module in model.modules() for _, weight in _layer_weights(module)}
    weights -= _embeddings(model).keys()
    names = {name for name, parameter in model.named_parameters() if id(parameter) in weights}
    return names.difference(*left_dense(model, pattern, ends=ends).values())


def left_dense(model: nn.Module, pattern: str, *, ends: bool = False) -> dict[str, list[str]]:
    """Layers' weights that N:M leaves as they are, by reason: no whole groups, and without `ends` stem and classifier.

    These two are what a timm model calls so, else the first and the last.
    """
    kind = n_of_m(pattern)
    if kind is None:
        return {}
    prunable = prunable_names(model)
    weights = {name: weight for name, weight in model.named_parameters() if name in prunable}
    turned = {id(w) for module in model.modules() if _has_inputs_first(module) for _, w in _layer_weights(module)}
    outer = set() if ends else _ends(model, list(weights))
    found: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if name in outer:
            found.setdefault("stem and classifier", []).append(name)
        elif id(weight) in turned:
            found.setdefault("inputs are not the second dimension", []).append(name)
        elif not kind.fits(weight.shape):
            found.setdefault(f"inputs not divisible by {kind.size}", []).append(name)
    return found


def _has_inputs_first(module: nn.Module) -> bool:
    return _is_conv1d(module) or isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))


def _ends(model: nn.Module, names: list[str]) -> set[str]:
    """The weights of stem and classifier among these names of a model's weights."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    layers: list[str] = []
    for key in ("first_conv", "classifier"):
        value = config.get(key) or ()
        layers += [value] if isinstance(value, str) else value
    told = {f"{layer}.weight" for layer in layers}.intersection(names)
    return told or set(names[:1] + names[-1:])


def tied_names(model: nn.Module) -> dict[str, str]:
    """Layers' weights that are an embedding's too, and so not prunable: name in the layer -> name in the embedding."""
    embeddings = _embeddings(model)
    return {
        f"{name}.{attribute}": embeddings[id(weight)]
        for name, module in model.named_modules()
        for attribute, weight in _layer_weights(module)
        if id(weight) in embeddings
    }


def computed_names(model: nn.Module) -> list[str]:
    """Layers' weights that a parametrization or `weight_norm` computes from other parameters, and so not prunable.

    What a zero there would have to be is the computation's affair: a direction's, an angle's, a factor's.
    """
    return [
        f"{name}.{attribute}".lstrip(".")
        for name, module in model.named_modules()
        for attribute in _weight_names(module)
        if attribute not in module._parameters
    ]


def recurrent_layers(model: nn.Module) -> dict[str, int]:
    """Layers whose matrices are not prunable because they recur: name -> how many weights these have."""
    return {
        name or type(module).__name__: sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
        for name, module in model.named_modules()
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase))
    }


def _is_marked(groups: Collection[Mapping[str, Any]]) -> bool:
    return any("prunable" in group for group in groups)


def prunable_parameters(param_groups: Collection[Mapping[str, Any]], pattern: str = WEIGHT) -> list[tuple[str, Tensor]]:
    """(name, parameter) of all prunable parameters, in the order of the groups.

    Groups that carry a `prunable` mark decide by it. Where no group does (timm's own train.py), every parameter with
    more than one dimension and a leading dimension above 1 is prunable, for N:M if it is made of whole groups.
    """
    return [pair for _, pair in _prunable(param_groups, pattern)]


def prunable_parts(
    param_groups: Collection[Mapping[str, Any]], pattern: str = WEIGHT
) -> list[tuple[dict[str, Any], list[tuple[str, Tensor]]]]:
    """The prunable parameters by the options of their own that groups say under `prune` (toolkit.prune.rules)."""
    parts: dict[tuple[Any, ...], tuple[dict[str, Any], list[tuple[str, Tensor]]]] = {}
    for group, pair in _prunable(param_groups, pattern):
        own = group.get("prune", {})
        parts.setdefault(tuple(sorted(own.items())), (own, []))[1].append(pair)
    return list(parts.values())


def _prunable(
    param_groups: Collection[Mapping[str, Any]], pattern: str
) -> Iterator[tuple[Mapping[str, Any], tuple[str, Tensor]]]:
    """(group, (name, parameter)) of all prunable parameters."""
    marked, position = _is_marked(param_groups), itertools.count()
    for group in param_groups:
        unnamed = (f"parameter {next(position)} of shape {tuple(parameter.shape)}" for parameter in group["params"])
        for name, parameter in zip(group.get("param_names") or unnamed, group["params"], strict=False):
            if group.get("prunable", False) if marked else _looks_prunable(parameter, pattern):
                yield group, (name, parameter)


def _looks_prunable(parameter: Tensor, pattern: str) -> bool:
    # A leading dimension of 1 leaves out class tokens and position embeddings.
    if parameter.ndim < 2 or parameter.shape[0] < 2:
        return False
    kind = n_of_m(pattern)
    return kind is None or kind.fits(parameter.shape)


def check_fits(named: Iterable[tuple[str, Tensor]], pattern: str) -> None:
    """Raise ValueError that names a prunable parameter which is not made of whole groups of N:M."""
    kind = n_of_m(pattern)
    for name, parameter in named:
        if kind is not None and not kind.fits(parameter.shape):
            raise ValueError(
                f"pattern={pattern} does not fit {name} of shape {tuple(parameter.shape)}: its second dimension is "
                f"not divisible by {kind.size}; toolkit.optim.param_groups(model, pattern={pattern!r}) leaves such out"
            )


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def announce_unmarked(param_groups: Collection[Mapping[str, Any]], pattern: str = WEIGHT) -> None:
    """Warn, on rank 0, of what an optimizer that is about to prune will take for lack of marks; for constructors.

    `param_groups` are the optimizer's own; marked ones are left without a word.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    if _is_marked(param_groups):
        return
    named = prunable_parameters(param_groups, pattern)
    get_logger().warning(
        "no parameter group says what is prunable, so every matrix is pruned, embeddings among them: %d weights in "
        "%s; toolkit.optim.param_groups(model) marks convolution and linear weights alone",
        sum(parameter.numel() for _, parameter in named),
        listed([name for name, _ in named]),
    )
