"""Channels that are zero throughout: nobody reads them, or what they still send on is a constant that can be folded."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.prune.channels import ChannelGroup, ChannelSlice

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
# What counts as one value: attention's weights sum to 1 up to rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class _Reader:
    """What a layer that reads channels is given, float64 [places] each, and the BatchNorm that alone reads it."""

    low: Tensor
    high: Tensor
    follower: nn.Module | None


def dead_channels(model: nn.Module, groups: Sequence[ChannelGroup], example_input: Tensor) -> dict[str, Tensor]:
    """Group name -> int64 channels that can be removed without a change of the output in eval mode.

    A channel is dead where each layer that reads it has only zeros for it; or where all rows that make it are zero, so
    that what it sends on (a bias, through norm and activation) is a constant, which each reader can take up: in its own
    bias or the running mean of the BatchNorm behind it, if it pads nothing. A layer keeps one channel at least.

    Args:
        model: the bare model; it stays as it is.
        groups: of `channel_groups`.
        example_input: any batch of images; constants are measured in a forward pass of it.
    """
    return _dead(model, groups, _observe(copy.deepcopy(model), groups, example_input))


def fold_dead_channels(
    model: nn.Module, groups: Sequence[ChannelGroup], example_input: Tensor
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy in which dead channels are zero throughout and nobody misses them, and which these are by group.

    What dies because its only readers died is found too. In eval mode the copy's output is the model's, up to rounding.
    """
    folded, before = copy.deepcopy(model), -1
    dead: dict[str, Tensor] = {}
    while sum(len(gone) for gone in dead.values()) > before:
        before = sum(len(gone) for gone in dead.values())
        readers = _observe(folded, groups, example_input)
        dead = _dead(folded, groups, readers)
        with torch.no_grad():
            for group in groups:
                _fold(folded, group, dead.get(group.name, torch.empty(0, dtype=torch.int64)), readers)
    return folded, dead


def _layer(model: nn.Module, one: ChannelSlice) -> Any:
    return model.get_submodule(one.name.rpartition(".")[0])


def _weights(model: nn.Module, group: ChannelGroup, axis: int) -> list[tuple[ChannelSlice, Any]]:
    """The convolution and linear weights among a group's slices along one axis, with their layers."""
    found = [(one, _layer(model, one)) for one in group.slices if one.axis == axis and one.name.endswith(".weight")]
    return [(one, layer) for one, layer in found if isinstance(layer, _LAYERS)]


def nonzero_channels(weight: Tensor, one: ChannelSlice) -> Tensor:
    """bool [channels]: whether a weight has anything but zeros in a channel's places."""
    by_place = weight.detach().movedim(one.axis, 0).flatten(1).ne(0).any(1).cpu()
    return by_place[one.places].any(1)


def _pads(layer: Any) -> bool:
    """Whether a border of zeros may stand beside what a convolution or linear layer reads."""
    if isinstance(layer, nn.Linear):
        return False
    unpadded = layer.padding == "valid" or (not isinstance(layer.padding, str) and not any(layer.padding))
    is_point = all(size == 1 for size in layer.kernel_size)
    # timm's Conv2dSame has padding 0 and pads by itself, but nothing around 1 × 1.
    return not (unpadded and (is_point or type(layer).forward in (nn.Conv1d.forward, nn.Conv2d.forward)))


def _dead(model: nn.Module, groups: Sequence[ChannelGroup], readers: dict[str, _Reader]) -> dict[str, Tensor]:
    found = {}
    for group in groups:
        silent = torch.ones(group.count, dtype=torch.bool, device="cpu")
        for one, layer in _weights(model, group, 0):
            silent &= ~nonzero_channels(layer.weight, one)
        gone = torch.ones_like(silent)
        for one, layer in _weights(model, group, 1):
            reader = readers[one.name]
            zero = ((reader.low == 0) & (reader.high == 0))[one.places].all(1)
            if not _pads(layer) and (layer.bias is not None or reader.follower is not None):
                spread = _ROUNDING * reader.high.abs().clamp(min=1)
                zero |= (reader.high - reader.low <= spread)[one.places].all(1)
            gone &= ~nonzero_channels(layer.weight, one) | (silent & zero)
        if gone.all():
            gone[0] = False  # no layer loses its last channel
        if gone.any():
            found[group.name] = gone.nonzero().view(-1)
    return found


def _fold(model: nn.Module, group: ChannelGroup, dead: Tensor, readers: dict[str, _Reader]) -> None:
    """Put what dead channels send on into their readers, and zeros into all their weights; in place."""
    for one, layer in _weights(model, group, 1):
        reader, places = readers[one.name], one.places[dead].view(-1)
        constant = (reader.low + reader.high)[places] / 2
        columns = layer.weight.detach().movedim(1, 0)[places.to(layer.weight.device)].double().cpu()
        used = columns.flatten(1).ne(0).any(1) & constant.ne(0)
        if used.any():
            sums = columns[used].flatten(2).sum(2) if columns.ndim > 2 else columns[used]
            sent = constant[used] @ sums
            if layer.bias is not None:
                layer.bias.add_(sent.to(layer.bias))
            else:
                mean: Any = reader.follower.running_mean  # type: ignore[union-attr]
                mean.sub_(sent.to(mean))
    for axis in (0, 1):
        for one, layer in _weights(model, group, axis):
            layer.weight.index_fill_(axis, one.places[dead].view(-1).to(layer.weight.device), 0.0)


def _observe(model: nn.Module, groups: Sequence[ChannelGroup], example_input: Tensor) -> dict[str, _Reader]:
    """What each reader of a group's channels is given, by its weight's name; `model` is the caller's own copy."""
    readers = {one.name: layer for group in groups for one, layer in _weights(model, group, 1)}
    ranges: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    made_by: dict[Any, nn.Module] = {}  # autograd's node -> the layer whose output it made
    norms: dict[nn.Module, tuple[nn.Module, Any]] = {}  # layer -> (BatchNorm that is given its output, that node)

    def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        axis = -1 if isinstance(layer, nn.Linear) else 1
        seen = inputs[0].detach().movedim(axis, 0).flatten(1).double()
        ranges[layer] = (seen.amin(1).cpu(), seen.amax(1).cpu())

    def after(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        made_by[output.grad_fn] = layer

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].grad_fn in made_by:
            norms[made_by[inputs[0].grad_fn]] = (norm, inputs[0].grad_fn)

    hooks = []
    for layer in dict.fromkeys(readers.values()):
        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(before_norm))
    modes = {module: module.training for module in model.modules()}
    with torch.inference_mode(False), torch.enable_grad():
        # Gradients from the image on, whatever is frozen: the graph says who reads an output.
        output = model.eval()(example_input.detach().clone().requires_grad_())
        uses = _uses(output.grad_fn)
    for hook in hooks:
        hook.remove()
    for module, training in modes.items():
        module.training = training
    followers = {layer: norm for layer, (norm, node) in norms.items() if uses[node] == 1}
    return {name: _Reader(*ranges[layer], followers.get(layer)) for name, layer in readers.items()}


def _uses(root: Any) -> Counter[Any]:
    """How often each node of autograd's graph is read."""
    uses: Counter[Any] = Counter()
    waiting, seen = [root], {root}
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
    return uses
