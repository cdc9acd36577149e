"""Parameter groups for the optimizers of this package: what may be pruned, and what decays."""

import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from toolkit.log import get_logger
from toolkit.prune.channels import ChannelGroup, channel_groups
from toolkit.prune.groups import computed_names, left_dense, listed, recurrent_layers, tied_names
from toolkit.prune.patterns import CHANNEL, WEIGHT
from toolkit.prune.rules import prunable_by_rules


def param_groups(
    model: nn.Module,
    weight_decay: float | None = None,
    *,
    pattern: str = WEIGHT,
    ends: bool = False,
    example_input: Tensor | None = None,
    lr_scales: Mapping[str, float] | None = None,
    rules: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A model's trainable parameters in groups by two questions: is it pruned, and does it decay?

        optimizer = AdamWPrune(param_groups(model), lr=1e-3, weight_decay=0.05, sparsity=0.7, end_step=6_000)
        ...  # train as with torch.optim.AdamW
        zeros, weights = optimizer.pruning.sparsity()

    | parameter | pruned | decays |
    | --- | --- | --- |
    | weights of convolution and linear layers, stem and classifier too | yes | yes |
    | transformers' `Conv1D`, projections of `nn.MultiheadAttention` | yes | yes |
    | recurrent layers (`nn.LSTM`, `nn.GRU`, their cells) | no, said in the log | yes |
    | embeddings, other matrices | no | yes |
    | a head whose weight is an embedding's (tied) | no, said in the log | yes |
    | what a weight is computed from (`weight_norm`, parametrizations) | no, said in the log | yes |
    | biases, norms and all else of one dimension | no | no |

    What a model names in its `no_weight_decay()` (timm's models have one) does not decay: timm's rule. Frozen
    parameters are left out; a shared one stands once, under its first name. The groups carry names, for messages. To
    keep a layer dense, move its parameters to a group with `prunable=False`.

    Args:
        model: the bare model, not the wrapper of DDP or `torch.compile`; with FSDP2 after `fully_shard`,
            for pattern channel before.
        weight_decay: of the groups that decay; None leaves it to the optimizer's own argument.
        pattern: the optimizer's. Layers that N:M does not fit, and without `ends` stem and classifier, are not pruned,
            said in the log.
        example_input: a batch of images, for pattern channel: which channels go together is seen from the model's
            forward pass (toolkit.prune.channels).
        lr_scales: factor of the learning rate by parameter's name, for timm's schedules, which read it off the groups.
        rules: regular expressions on parameters' names -> `skip`, a sparsity, or a dict of sparsity, pattern and score
            (toolkit.prune.rules); raises ValueError for one that matches nothing.

    Returns:
        At most four groups `{"params": [(name, parameter), ...], "prunable": bool}` for each factor, which is their
        `lr_scale`, and for each set of options by a rule, which is their `prune`; those that do not decay have
        `weight_decay` 0, the others the one given. With pattern channel the last one has `channels`, which the
        optimizers here take out.
    """
    _announce(model, pattern, ends)
    prunable = prunable_by_rules(model, rules, pattern, ends=ends)
    given = {} if weight_decay is None else {"weight_decay": weight_decay}
    made = [
        {"params": named, "prunable": may_prune, **(given if decays else {"weight_decay": 0.0})}
        | ({"lr_scale": scale} if lr_scales else {})
        | ({"prune": dict(own)} if own else {})
        for (scale, may_prune, decays, own), named in _sorted(model, prunable, lr_scales or {})
    ]
    if pattern == CHANNEL:
        made[-1]["channels"] = _channels(model, example_input, set(prunable))
    return made


def _sorted(
    model: nn.Module, prunable: Mapping[str, Mapping[str, Any]], scales: Mapping[str, float]
) -> list[tuple[tuple[float, bool, bool, tuple[Any, ...]], list[tuple[str, Tensor]]]]:
    """Trainable parameters by (lr_scale, pruned, decays, options of their own), in the order of these."""
    exempt: set[str] = set(getattr(model, "no_weight_decay", set)())
    groups: dict[tuple[float, bool, bool, tuple[Any, ...]], list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = any(fnmatch.fnmatch(name, spare) for spare in exempt)
            decays = parameter.ndim > 1 and not name.endswith(".bias") and not spared
            own = tuple(sorted(prunable.get(name, {}).items()))
            groups.setdefault((scales.get(name, 1.0), name in prunable, decays, own), []).append((name, parameter))
    return sorted(groups.items(), key=lambda item: item[0])


def _announce(model: nn.Module, pattern: str, ends: bool) -> None:
    """Say in the log what is not pruned that a user may expect to be."""
    for name, embedding in tied_names(model).items():
        get_logger().info("%s is not pruned: it is the embedding %s", name, embedding)
    if computed := computed_names(model):
        get_logger().warning("not pruned, for they are computed from other parameters: %s", ", ".join(computed))
    if recurrent := recurrent_layers(model):
        get_logger().warning(
            "not pruned, for they are recurrent layers: %s (%d weights); give their matrices to a group with "
            "prunable=True to prune them",
            ", ".join(recurrent),
            sum(recurrent.values()),
        )
    for reason, names in left_dense(model, pattern, ends=ends).items():
        get_logger().info("%s leaves dense, %s: %s", pattern, reason, listed(names))


def _channels(model: nn.Module, example_input: Tensor | None, prunable: set[str]) -> list[ChannelGroup]:
    """The groups of channels all whose weights are pruned."""
    if example_input is None:
        raise ValueError("pattern='channel' needs example_input, a batch of images as the model takes it")
    fixed = {name for name, p in model.named_parameters() if p.ndim > 1 and not (p.requires_grad and name in prunable)}
    groups = channel_groups(model, example_input)
    return [group for group in groups if not any(one.name in fixed for one in group.slices)]
