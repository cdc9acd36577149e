"""A model without the channels that were pruned: smaller and faster on every device.

On disk it is a folder: `model.safetensors`, and `channels.json`, the plan by which timm's model is cut to its shapes.
"""

import contextlib
import copy
import dataclasses
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from toolkit.errors import blaming, refuse
from toolkit.files import read_json, replacing, write_json
from toolkit.prune.channels import ChannelGroup
from toolkit.prune.dead import fold_dead_channels

PLAN, WEIGHTS, _FORMAT = "channels.json", "model.safetensors", "shrunk/1"
_CUT = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm)
# What a stranger's plan may ask for: the model is built whole before it is cut.
MAX_PLACES = 2**20  # of a layer along one axis
MAX_OF_AN_ARGUMENT = 2**14
MAX_ENTRIES = 64  # of an argument that is a list
MAX_TIMES_THE_FILE = 64  # bytes of the whole model
MAX_TENSORS = 2**13  # in the file; timm's deepest models have 2,500
MAX_PARTS_OF_A_TENSOR = 8  # modules, parameters and buffers made for each; timm's models make up to 4.3
_REFUSED_ARGUMENTS = ("pretrained", "checkpoint_path", "cache_dir", "features_only", "num_classes", "scriptable")


Layers = dict[str, dict[str, list[int] | None]]
"""What stays of each cut layer: {layer: {"out": kept places or None, "in": the same}}."""


@dataclass(frozen=True)
class Plan:
    """timm's model, and what of each cut layer stays.

    "out" counts rows of a weight (channels of a depthwise convolution and of a norm), "in" its input places.
    """

    layers: Layers
    model: str = ""  # timm's name
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int = 0
    img_size: int | list[int] | None = None  # side, or height and width, of `set_input_size`; None: the model's own
    input_size: tuple[int, ...] = (3, 224, 224)  # channels, height and width that it was exported for
    bn_eps: float | None = None  # of all BatchNorms; None: the model's own


def shrink(
    model: nn.Module, groups: Sequence[ChannelGroup], keep: Mapping[str, Sequence[int] | Tensor]
) -> tuple[nn.Module, Plan]:
    """A copy of a model with only some of the channels, and the plan by which it can be made again.

    Args:
        model: the bare model; it stays as it is.
        groups: of `channel_groups`.
        keep: group name -> the channels that stay, ascending; groups that are not named stay whole.

    Raises:
        ValueError: an unknown group; channels that do not ascend, are none or out of range.
    """
    unknown = keep.keys() - {group.name for group in groups}
    refuse({f"{name} is no group of channels; take one of channel_groups(model, …)": True for name in sorted(unknown)})
    removed: dict[tuple[str, str], set[int]] = defaultdict(set)
    for group in groups:
        if group.name in keep:
            kept = _checked_places(torch.as_tensor(keep[group.name]).tolist(), group.count, f"keep of {group.name}")
            gone = torch.ones(group.count, dtype=torch.bool).index_fill_(0, torch.tensor(kept), False)
            for one in group.slices if gone.any() else ():
                end = "out" if one.axis == 0 else "in"
                removed[one.name.rpartition(".")[0], end].update(one.places[gone].view(-1).tolist())
    layers: Layers = {}
    for (name, end), places in removed.items():
        size = _sizes(model.get_submodule(name))[end]
        layers.setdefault(name, {"out": None, "in": None})[end] = [n for n in range(size) if n not in places]
    smaller = copy.deepcopy(model)
    cut(smaller, layers)
    return smaller, Plan(layers, num_classes=int(getattr(model, "num_classes", 0)))


def remove_dead_channels(
    model: nn.Module, groups: Sequence[ChannelGroup], example_input: Tensor
) -> tuple[nn.Module, Plan, dict[str, Tensor]]:
    """`shrink` without the channels that are zero throughout (see `toolkit.prune.dead`); and which went, by group."""
    folded, dead = fold_dead_channels(model, groups, example_input)
    counts = {group.name: group.count for group in groups}
    keep = {name: sorted(set(range(counts[name])) - set(gone.tolist())) for name, gone in dead.items()}
    return *shrink(folded, groups, keep), dead


def save_shrunk(folder: Path, model: nn.Module, plan: Plan) -> None:
    """Write a shrunk model's two files; `load_shrunk` reads them."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(weights, temporary, {"adamwprune": json.dumps({"format": _FORMAT})})
    write_json(folder / PLAN, {"format": _FORMAT, **dataclasses.asdict(plan)})


def load_shrunk(folder: str | Path) -> nn.Module:
    """The model of a folder with `model.safetensors` and `channels.json`, in eval mode, on the CPU.

    Raises:
        ValueError: the plan is none, or not of these weights.
    """
    folder = Path(folder)
    if not (folder / PLAN).is_file():
        raise ValueError(f"{folder} has no {PLAN}; give a folder that launch.export --shrink wrote")
    plan, file = read_plan(folder / PLAN), folder / WEIGHTS
    with blaming(f"{file} is not of the model in {PLAN}", "export both again with launch.export --shrink"):
        try:
            with safe_open(file, framework="pt") as opened:
                names = opened.keys()
                refuse({f"it has {len(names):,} tensors, at most {MAX_TENSORS:,} are taken": len(names) > MAX_TENSORS})
                stored = {key: tuple(opened.get_slice(key).get_shape()) for key in names}
        except SafetensorError as error:
            raise ValueError(f"it cannot be read: {error}") from None
        with torch.device("meta"), _at_most_parts(MAX_PARTS_OF_A_TENSOR * len(stored)):
            model = _built(plan)
        whole_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
        limit_bytes = MAX_TIMES_THE_FILE * file.stat().st_size
        refuse(
            {
                f"the whole model has {whole_bytes:,} bytes, a file of it at most {limit_bytes:,}": whole_bytes
                > limit_bytes
            }
        )
        cut(model, plan.layers)
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        others = [name for name in (wanted.keys() | stored.keys()) if wanted.get(name) != stored.get(name)]
        refuse(
            {f"{name} has shape {stored.get(name)}, by the plan {wanted.get(name)}": True for name in sorted(others)}
        )
        _try_forward(model, plan.input_size)
        with torch.random.fork_rng(devices=[]):  # what timm draws is not used
            model = _built(plan)
        cut(model, plan.layers)
        model.load_state_dict(load_file(file))
    return model.eval()


def refuse_shrunk(path: Path, asked: str) -> None:
    """Raise ValueError where `path` is a shrunk model, or a file of one, and `asked` takes whole models."""
    folder = path if path.is_dir() else path.parent
    is_file = path.suffix == ".safetensors" and path.is_file() and _FORMAT in _said_of(path)
    if (path.is_dir() and (folder / PLAN).is_file()) or is_file:
        raise ValueError(
            f"{asked}: {path} is a shrunk model, not a whole one; load it with "
            f"toolkit.load_shrunk({str(folder)!r}), or take the run itself or its export without --shrink"
        )


def _said_of(file: Path) -> str:
    try:
        with safe_open(file, framework="pt") as opened:
            return str((opened.metadata() or {}).get("adamwprune", ""))
    except (SafetensorError, OSError):
        return ""  # whoever reads it says what is wrong with it


def read_plan(path: Path) -> Plan:
    """The plan in a `channels.json`, checked. Raises ValueError, one line, for what is none."""
    with blaming(f"{path} is no plan of a shrunk model", "export it again with launch.export --shrink"):
        content = read_json(path)
        names = {item.name for item in dataclasses.fields(Plan)} | {"format"}
        if not isinstance(content, dict) or content.keys() | {"bn_eps"} != names or content["format"] != _FORMAT:
            raise ValueError(f"it must hold {', '.join(sorted(names))}, of format {_FORMAT}")
        layers = check_layers(content["layers"])
        model, kwargs = content["model"], content["model_kwargs"]
        known = isinstance(model, str) and timm.is_model(model.partition(".")[0])
        refuse({f"model {str(model)[:80]!r} is not one of timm's": not known})
        refuse({"its model_kwargs are no arguments by name": not isinstance(kwargs, dict)})
        for key, value in kwargs.items():
            entries = list(_entries(value))
            fine = (
                not key.startswith(_REFUSED_ARGUMENTS) and len(entries) <= MAX_ENTRIES and all(map(_is_small, entries))
            )
            refuse({f"argument {key[:80]}={str(value)[:80]} is not taken": not fine})
        sizes = content["input_size"]
        sides: list[Any] = sizes if isinstance(sizes, list) and len(sizes) == 3 else [None]
        img_size, eps = content["img_size"], content.get("bn_eps")
        size = img_size if isinstance(img_size, list) else [img_size] * 2
        given = [content["num_classes"], *sides, *([] if img_size is None else size)]
        fine = len(size) == 2 and all(type(number) is int and 0 < number <= MAX_PLACES for number in given)
        refuse({f"num_classes, img_size and input_size are {str(given)[:80]}, not counts": not fine})
        fine = eps is None or (isinstance(eps, float) and 0.0 < eps <= 1.0)
        refuse({f"bn_eps {str(eps)[:80]} is not in (0, 1]": not fine})
        return Plan(layers, model, kwargs, content["num_classes"], img_size, tuple(sides), eps)


def check_layers(layers: Any) -> Layers:
    """`layers` if they are names with places. Raises ValueError."""
    refuse({"its layers are no names with places": not isinstance(layers, dict)})
    for name, ends in layers.items():
        fine = isinstance(name, str) and isinstance(ends, dict) and ends.keys() == {"out", "in"}
        refuse({f"layer {str(name)[:80]} must have out and in": not fine})
        for end, places in ends.items():
            if places is not None:
                _checked_places(places, MAX_PLACES, f"{end} of layer {name[:80]}")
    return dict(layers)


def _entries(value: Any) -> Iterator[Any]:
    """A value, or those in a list of values or of such lists."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, list):
            yield from entry
        else:
            yield entry


def _is_small(value: Any) -> bool:
    """Whether it is a plain value of an argument that makes no model of any size."""
    if isinstance(value, str):
        return len(value) <= 80
    return value is None or (isinstance(value, (bool, int, float)) and abs(value) <= MAX_OF_AN_ARGUMENT)


def _checked_places(places: Any, size: int, what: str) -> list[int]:
    """`places` if they are plain ints below `size`, ascending and at least one. Raises ValueError."""
    if not isinstance(places, list) or not places or not all(type(place) is int for place in places):
        raise ValueError(f"{what} must be a list of places, at least one; got {str(places)[:40]}")
    ascend = all(one < other for one, other in itertools.pairwise(places))
    if not ascend or places[0] < 0 or places[-1] >= size:
        raise ValueError(f"{what} must ascend from 0 to at most {size - 1}; got {places[0]} … {places[-1]}")
    return places


def _built(plan: Plan) -> nn.Module:
    """timm's model of the plan, whole, with random weights."""
    model = timm.create_model(plan.model, num_classes=plan.num_classes, **plan.model_kwargs)
    if plan.img_size is not None and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=plan.img_size)  # type: ignore[operator]
    for module in model.modules():
        if plan.bn_eps is not None and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = plan.bn_eps
    return model.eval()


@contextlib.contextmanager
def _at_most_parts(limit: int) -> Iterator[None]:
    """Within, ValueError ends the making of a model of more modules, parameters and buffers: depth has many names."""
    made = itertools.count(1)

    def count(module: nn.Module, name: str, part: object) -> None:
        if part is not None and next(made) > limit:
            raise ValueError(f"its model has more than {limit:,} parts, too many for the file's tensors")

    with contextlib.ExitStack() as stack:
        for register in (
            register_module_module_registration_hook,
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
        ):
            stack.callback(register(count).remove)
        yield


def _try_forward(model: nn.Module, input_size: Sequence[int]) -> None:
    """A forward pass without values, which a plan that cuts a layer and not its reader does not survive."""
    tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    functional_call(model, tensors, (torch.empty(2, *input_size, device="meta"),))


def _sizes(layer: nn.Module) -> dict[str, int]:
    """Places of a layer by end, as a plan counts them."""
    tensor = layer.running_mean if isinstance(layer, nn.modules.batchnorm._BatchNorm) else layer.weight
    shape = tensor.shape if isinstance(tensor, Tensor) else (0,)
    return {"out": shape[0], "in": shape[1] if len(shape) > 1 else 0}


def cut(model: nn.Module, layers: Layers) -> None:
    """Leave of each layer what the plan keeps, in place. Raises ValueError for a layer that cannot be cut so."""
    modules = dict(model.named_modules())
    for name, ends in layers.items():
        layer = modules.get(name)
        if not isinstance(layer, _CUT):
            raise ValueError(f"the model has no layer {name} that can be cut")
        for end, places in ends.items():
            if places is not None:
                _checked_places(places, _sizes(layer)[end], f"{end} of layer {name}")
        _cut_layer(layer, ends["out"], ends["in"])
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, timm.layers.Attention) and layer is parent.qkv and ends["out"] is not None:
            heads, rest = divmod(len(ends["out"]), 3 * parent.head_dim)
            refuse({f"{name} keeps {len(ends['out'])} rows, which are no whole heads": rest})
            parent.num_heads, parent.attn_dim = heads, heads * parent.head_dim


def cut_tensor(layers: Layers, name: str, tensor: Tensor) -> Tensor:
    """What is left of a parameter or buffer of the whole model, or of a tensor shaped like it."""
    layer, _, attribute = name.rpartition(".")
    if layer not in layers or not tensor.ndim:
        return tensor
    for axis, places in ((0, layers[layer]["out"]), (1, layers[layer]["in"] if attribute == "weight" else None)):
        if places is not None:
            tensor = tensor.index_select(axis, torch.tensor(places, device=tensor.device))
    return tensor


def both_cuts(first: Layers, second: Layers) -> Layers:
    """What is left of the whole model's layers after a cut of what another cut has left."""
    both = {name: dict(ends) for name, ends in first.items()}
    for name, ends in second.items():
        whole = both.setdefault(name, {"out": None, "in": None})
        for end, places in ends.items():
            before = whole[end]
            if places is not None:
                whole[end] = places if before is None else [before[place] for place in places]
    return both


def _cut_layer(layer: nn.Module, out: list[int] | None, read: list[int] | None) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(layer, name, None)
        if tensor is None:
            continue
        left = cut_tensor({"": {"out": out, "in": read}}, name, tensor.detach())
        setattr(layer, name, nn.Parameter(left, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left)
    sizes = _sizes(layer)
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = sizes["out"], sizes["in"]
    elif isinstance(layer, nn.modules.conv._ConvNd):
        depthwise = layer.groups > 1
        layer.out_channels, layer.in_channels = sizes["out"], sizes["out"] if depthwise else sizes["in"]
        layer.groups = sizes["out"] if depthwise else 1
    else:
        layer.num_features = sizes["out"]  # type: ignore[assignment]
