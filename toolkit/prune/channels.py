"""What goes with a channel: by torch-pruning's dependency graph, what must go where a channel of a layer goes.

A group is one layer's output channels, which may be removed one by one, with all that belongs to each: the layers'
rows that make it, its BatchNorm, the input slices of those that read it. Residual streams stay whole.
"""

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from toolkit.errors import blaming
from toolkit.log import get_logger

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_TYPES_OF_LAYERS = ("CONV", "DEPTHWISE_CONV", "LINEAR", "BN", "LN", "GN", "IN", "PRELU", "EMBED", "MHA", "LSTM")
_SHOWN = 6  # layers that a message names one by one
# Layers that compute what their class says: a subclass may do anything with its weight (standardise it, mix several).
_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, timm.layers.Conv2dSame.forward)
_LINEARS = (nn.Linear.forward, timm.layers.Linear.forward)
_NORMS = (
    nn.BatchNorm2d.forward,
    nn.SyncBatchNorm.forward,
    timm.layers.BatchNormAct2d.forward,
    timm.layers.SyncBatchNormAct.forward,
)
# Operations, by autograd's names, that treat each channel by itself. What is not named may mix them.
_APART = {
    *("Abs", "Clamp", "ClampMin", "Div", "Exp", "Mul", "Neg", "Pow", "Sqrt"),
    *("Elu", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "LogSigmoid", "Mish", "Relu", "Sigmoid"),
    *("Silu", "Softplus", "Tanh"),
    *("AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "AvgPool2D", "MaxPool2DWithIndices", "ReflectionPad2D"),
    *("ReplicationPad2D", "UpsampleBicubic2D", "UpsampleBilinear2D", "UpsampleNearest2D"),
    *("Alias", "Clone", "Squeeze", "T", "ToCopy", "Unsqueeze", "NativeBatchNorm"),
}
# What attention does beside that within a head.
_IN_ATTENTION = {"Bmm", "Expand", "Permute", "SafeSoftmax", "Softmax", "Transpose", "Unbind", "UnsafeView", "View"}


@dataclass(frozen=True)
class ChannelSlice:
    """Positions along `axis` of a named parameter or buffer that each channel of a group owns."""

    name: str  # as in model.named_parameters() or named_buffers()
    axis: int
    places: Tensor  # int64 [channels, per]; per > 1 where a channel is a head, or is flattened into features


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can be removed one by one, each with all its slices."""

    name: str  # the layer that makes the channels, for example layer1.0.conv1
    count: int  # channels; of attention, heads
    slices: tuple[ChannelSlice, ...]

    def channels_in(self, multiple: int) -> int:
        """The fewest channels whose rows are a multiple of this number; a head has many rows."""
        return multiple // math.gcd(multiple, min(one.places.shape[1] for one in self.slices))


class _WholeError(Exception):
    """Why a layer's channels are not removed one by one."""


def channel_groups(model: nn.Module, example_input: Tensor) -> list[ChannelGroup]:
    """The groups of a bare model, in the order of its modules; deterministic. The log names what stays whole, and why.

    Left out are residual streams (channels that are added to others), the classifier's outputs, channels beside a bare
    parameter, those that a norm mixes, grouped convolutions, shared weights, and whatever is not known to keep channels
    apart. The model is traced as a copy without values in eval mode, and stays as it is.

    Args:
        model: the bare model, not the wrapper of DDP or `torch.compile`, and before `fully_shard`.
        example_input: a batch as the model takes it, float [n, channels, height, width]; its values do not matter.

    Raises:
        ValueError: torch-pruning is not installed or cannot trace the model, or the model is sharded or cannot be
            copied.
    """
    twin = _twin(model)
    graph = _trace(twin, example_input)
    names = {module: name for name, module in twin.named_modules()}
    groups: list[ChannelGroup] = []
    whole: dict[str, list[nn.Module]] = defaultdict(list)  # reason -> layers
    seen: set[nn.Module] = set()
    for module, name in names.items():
        if module not in seen and module in graph.module2node and isinstance(module, _LAYERS):
            members = graph.get_pruning_group(module, graph.get_pruner_of_module(module).prune_out_channels, [0])
            makers = _makers(graph, members)
            seen.update(makers)
            try:
                _refuse_mixing(graph, members, _attention_of(twin, name))
                groups.append(_group(twin, graph, names, module, members))
            except _WholeError as reason:
                whole[str(reason)] += makers
    _say_what_stays(groups, whole, names)
    return groups


def _say_what_stays(groups: list[ChannelGroup], whole: dict[str, list[nn.Module]], names: dict[nn.Module, str]) -> None:
    for reason, layers in whole.items():
        get_logger().info(
            "%s weights in %d layers (%s) keep their channels: %s",
            f"{sum(layer.weight.numel() for layer in layers):,}",  # type: ignore[operator,misc]
            len(layers),
            ", ".join([names[layer] for layer in layers[:_SHOWN]] + ["…"] * (len(layers) > _SHOWN)),
            reason,
        )
    get_logger().info("%d channels in %d groups can be pruned", sum(group.count for group in groups), len(groups))


def _makers(graph: Any, members: Any) -> list[nn.Module]:
    """The layers that make a group's channels, the first one first."""
    return [
        dep.target.module
        for dep, _ in members
        if isinstance(dep.target.module, _LAYERS) and graph.is_out_channel_pruning_fn(dep.handler)
    ]


def _attention_of(twin: nn.Module, name: str) -> timm.layers.Attention | None:
    """The attention whose heads the layer `name` makes; None for other layers, and attention of another kind."""
    parent = twin.get_submodule(name.rpartition(".")[0])
    is_known = type(parent).forward is timm.layers.Attention.forward
    return parent if is_known and name.rpartition(".")[2] == "qkv" else None  # type: ignore[return-value]


def _refuse_mixing(graph: Any, members: Any, attention: nn.Module | None) -> None:
    """Raise _WholeError with the reason why the channels of a group do not go one by one."""
    nodes = list(dict.fromkeys(dep.target for dep, _ in members))
    operations = {node: node.grad_fn.name().partition("Backward")[0] for node in nodes if hasattr(node.grad_fn, "name")}
    plain = [node for node in nodes if node.type.name not in _TYPES_OF_LAYERS]
    ends = (dep.target for dep, _ in members if graph.is_out_channel_pruning_fn(dep.handler))
    if any(node.type.name == "OUTPUT" or not node.outputs for node in ends):
        raise _WholeError("they are the model's output")
    if any(operations.get(node) in ("Add", "Sub") and len(node.inputs) > 1 for node in plain):
        raise _WholeError("a residual stream, to which others are added")
    for node in nodes:
        if node.type.name == "PARAMETER":
            raise _WholeError("a bare parameter stands beside them")
        if node.type.name in _TYPES_OF_LAYERS:
            _refuse_layer(node.module, graph.calls, graph.owners)
    batch_norms = sum(isinstance(node.module, timm.layers.BatchNormAct2d) for node in nodes)
    if sum(operations.get(node) == "NativeBatchNorm" for node in plain) > batch_norms:
        raise _WholeError("a BatchNorm without parameters is among them")
    for node in plain:
        _refuse_operation(node, operations.get(node, "unknown"), attention is not None)


def _refuse_layer(layer: nn.Module, calls: Counter[nn.Module], owners: Counter[int]) -> None:
    forward = type(layer).forward
    if calls[layer] > 1:
        raise _WholeError("a layer among them is used twice")
    if any(owners[id(tensor)] > 1 for tensor in _tensors_of(layer)):
        raise _WholeError("a weight among them is shared")
    if getattr(layer, "parametrizations", None) or "weight" not in layer._parameters:
        raise _WholeError("a weight among them is computed from others")
    if forward in _CONVOLUTIONS:
        groups, channels = layer.groups, (layer.in_channels, layer.out_channels)
        if groups != 1 and channels != (groups, groups):
            raise _WholeError("a convolution in groups is among them")
    elif forward not in (*_LINEARS, *_NORMS):
        raise _WholeError(f"{type(layer).__name__} is among them, which may mix channels")


def _refuse_operation(node: Any, name: str, in_attention: bool) -> None:
    """Raise _WholeError where an operation may mix channels, or is one that the library maps wrongly."""
    fine = name in _APART or (in_attention and name in _IN_ATTENTION)
    if name in ("Add", "Sub"):
        fine = len(node.inputs) == 1  # a number is added
    elif name in ("Addmm", "Mm"):  # within a linear layer
        fine = all(out.type.name in ("LINEAR", "RESHAPE") for out in node.outputs)
    elif name in ("Mean", "ConstantPadNd", "Cat") or (node.type.name == "RESHAPE" and not in_attention):
        after = _shape(node.grad_fn, 0)
        given = [_shape(made_by, number) for made_by, number in node.grad_fn.next_functions if made_by is not None]
        before = given[0] if given else (0,)
        if name == "Mean":  # over height and width
            fine = len(before) == 4 and after in (before[:2], (*before[:2], 1, 1))
        elif name == "ConstantPadNd":
            fine = len(before) == 4 and before[:2] == after[:2]
        elif name == "Cat":  # of images; the library maps no others
            fine = len(after) == 4 and sum(shape[1] for shape in given) == after[1]
            fine = fine and node.enable_index_mapping and node.module.offsets is not None
        else:
            fine = _keeps_channels(before, after)
    if not fine:
        raise _WholeError(f"{name} is among them, which may mix channels")


def _shape(grad_fn: Any, number: int) -> tuple[int, ...]:
    """The shape of an output of the operation that an autograd node is of."""
    return tuple(grad_fn._input_metadata[number].shape)


def _keeps_channels(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a view leaves the channels, second dimension of images and last one of tokens, one behind the other."""
    images = len(before) >= 3 and before[:2] == after[:2]
    flattened = len(before) == 4 and after == (before[0], before[1] * before[2] * before[3])
    tokens = len(before) != 4 and len(after) != 4 and before[-1] == after[-1]
    return images or flattened or tokens


def _group(twin: nn.Module, graph: Any, names: dict[nn.Module, str], module: nn.Module, members: Any) -> ChannelGroup:
    """The group of a layer; `members` is what goes with its first channel. Raises _WholeError where it is none."""
    rows = int(module.weight.shape[0])  # type: ignore[index]
    together = len(members[0].idxs)  # rows of the layer itself that go together: query, key and value
    if rows % together:
        raise _WholeError("its rows go together in other ways than side by side")
    attention = _attention_of(twin, names[module])
    unit = int(attention.head_dim) if attention is not None else 1
    fn = graph.get_pruner_of_module(module).prune_out_channels
    everything = graph.get_pruning_group(module, fn, list(range(rows // together)))
    count = rows // together // unit
    slices: dict[tuple[str, int], ChannelSlice] = {}
    for item in everything:
        node, idxs = item.dep.target, (item.root_idxs, item.idxs)
        if node.type.name not in _TYPES_OF_LAYERS:
            continue
        reads = node.type.name in ("CONV", "LINEAR") and not graph.is_out_channel_pruning_fn(item.dep.handler)
        tensors = {"weight": 1} if reads else dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
        for attribute, axis in tensors.items():
            tensor = getattr(node.module, attribute, None)
            if tensor is not None:
                name = f"{names[node.module]}.{attribute}"
                slices[name, axis] = ChannelSlice(name, axis, _places(*idxs, count, unit, tensor.shape[axis]))
    if slices[f"{names[module]}.weight", 0].places.numel() != rows:
        raise _WholeError("its rows go together in other ways than side by side")
    return ChannelGroup(names[module], count, tuple(slices.values()))


def _places(roots: Iterable[int], places: Iterable[int], count: int, unit: int, size: int) -> Tensor:
    """int64 [count, per]: the places that belong to each channel, ascending. Raises _WholeError otherwise."""
    root, place = torch.tensor(roots, device="cpu") // unit, torch.tensor(places, device="cpu")
    per = len(place) // count
    found = place.sort(stable=True)
    by_channel = root[found.indices].sort(stable=True)
    whole = torch.equal(by_channel.values, torch.arange(count, device="cpu").repeat_interleave(per))
    if not whole or len(place.unique()) != len(place) or int(place.min()) < 0 or int(place.max()) >= size:
        raise _WholeError("they are read in other ways than one by one")
    return found.values[by_channel.indices].view(count, per)


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers, without its children's."""
    own = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in own if tensor is not None]


def _twin(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in eval mode, that wants all gradients and has no hooks: for tracing."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError("which channels go together is seen before fully_shard; make the groups first")
    memo: dict[int, Any] = {id(buffer): buffer.detach().to("meta") for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.is_floating_point())
    remedy = "prune it by weight, or make the groups of a copy that has plain modules and tensors"
    with blaming(f"{type(model).__name__} cannot be copied to see which channels go together", remedy):
        twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


def _trace(twin: nn.Module, example_input: Tensor) -> Any:
    """torch-pruning's graph of the model."""
    try:
        from torch_pruning import DependencyGraph
    except ImportError:
        raise ValueError(
            'channels need torch-pruning, which is not installed; pip install "adamwprune-toolkit[export]"'
        ) from None
    calls: Counter[nn.Module] = Counter()
    for module in twin.modules():
        module.register_forward_pre_hook(lambda module, inputs: calls.update([module]))
    with torch.inference_mode(False), torch.enable_grad():
        try:
            graph = DependencyGraph().build_dependency(
                twin,
                torch.empty_like(example_input, device="meta"),
                forward_fn=lambda model, images: model(images),
                verbose=False,
            )
        except (RuntimeError, TypeError, NotImplementedError, AttributeError, IndexError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{type(twin).__name__} cannot be traced for its channels ({reason}); prune it by weight"
            ) from error
    graph.calls = calls
    graph.owners = Counter(id(tensor) for module in twin.modules() for tensor in _tensors_of(module))
    return graph
