"""Models to be measured for inference: dense, with zeros by three patterns, without channels, and of runs."""

import copy
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor, nn

from launch.packing import pack_weights
from launch.run_model import evaluation_batches, flops, num_weights, run_model, run_weights
from toolkit.command import say
from toolkit.prune.channels import ChannelGroup, channel_groups
from toolkit.prune.groups import prunable_names
from toolkit.shrink import remove_dead_channels, shrink

WEIGHT, CHANNEL = (0.7, 0.9, 0.95), (0.3, 0.5, 0.7)


@dataclass
class Candidate:
    """One row: a model in eval mode, how it was pruned, and what is known of it without a clock."""

    name: str
    model: nn.Module
    pattern: str  # dense, weight, N:M or channel
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Family:
    """Rows that are compared with the first of them."""

    name: str
    input_size: tuple[int, ...]
    note: str
    candidates: list[Candidate]


def random_family(name: str, multiple: int = 1) -> Family:
    """A timm model with random weights by every pattern; the zeros are the smallest weights of each layer.

    With a `multiple` above 1 channels are removed in a second way too: widths to the nearest multiple of it.
    """
    torch.manual_seed(0)
    dense = timm.create_model(name).eval()
    size = tuple(dense.pretrained_cfg["input_size"])  # type: ignore[index]
    made = [Candidate("dense", dense, "dense")]
    for share in WEIGHT:
        made.append(Candidate(f"weight {share:.0%}", _with_zeros(dense, _smallest(share)), "weight"))
    classifier = dense.get_classifier()  # type: ignore[operator]
    made.append(Candidate("2:4", _with_zeros(dense, two_of_four, [classifier]), "N:M"))
    groups = channel_groups(dense, torch.zeros(2, *size))
    for share, number in product(CHANNEL if groups else (), dict.fromkeys((1, multiple))):
        one = _without_channels(dense, groups, share, number)
        if number == 1 or one.facts != made[-1].facts:  # 50 % of resnet50's widths are multiples of 16 as they are
            made.append(one)
    return Family(name, size, "random weights", [_counted(one, size) for one in made])


def _without_channels(dense: nn.Module, groups: Sequence[ChannelGroup], share: float, multiple: int) -> Candidate:
    kept = kept_channels(groups, share, multiple)
    name = f"channel {share:.0%}" + (f" by {multiple}" if multiple > 1 else "")
    widths = sorted({(group.count, len(kept[group.name])) for group in groups})
    gone = 1 - sum(map(len, kept.values())) / sum(group.count for group in groups)
    facts = {"widths": list(map(list, widths)), "channels_gone": gone}
    return Candidate(name, shrink(dense, groups, kept)[0], "channel", facts)


def run_family(run: Path) -> Family:
    """What a run ended with: as it is, and without its dead channels if any; top-1 on its evaluation split."""
    say(f"{run}: loading, top-1")
    checkpoint, weights, _ = run_weights(run)
    model, config, cut = run_model(checkpoint, weights)
    size = tuple(int(side) for side in _input_size(config, model))
    images = torch.randn(8, *size, generator=torch.Generator().manual_seed(0))
    smaller, _, dead = remove_dead_channels(model, channel_groups(model, images), images)
    made = [Candidate("as trained (--prune-shrink)" if cut else "as trained", model, "channel" if cut else "weight")]
    if gone := sum(len(channels) for channels in dead.values()):
        made.append(Candidate(f"without {gone} dead channels", smaller, "channel"))
    note = ""
    for one in made:
        try:
            one.facts["top1"] = _top1(one.model, evaluation_batches(config, model))
        except (OSError, ValueError) as error:
            note = f"no top-1, for its data is not at hand ({str(error).splitlines()[0]})"
    return Family(f"{run.name} ({config.model})", size, note, [_counted(one, size) for one in made])


def _input_size(config: Any, model: nn.Module) -> Iterable[int]:
    from toolkit.builder.data import input_settings

    return input_settings(config, model)["input_size"]


def _top1(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Percent of the images whose class comes first."""
    hits = count = 0
    with torch.inference_mode():
        for images, labels in batches:
            hits += int((model(images).argmax(1) == labels).sum())
            count += len(labels)
    return 100 * hits / count


def _counted(one: Candidate, size: tuple[int, ...]) -> Candidate:
    """With weights, operations and sizes of files."""
    say(f"{one.name}: sizes")
    weights = {name: tensor.contiguous() for name, tensor in one.model.state_dict().items()}
    content = save(weights)
    one.facts |= {
        "weights": num_weights(one.model),
        "not_zero": sum(int(parameter.count_nonzero()) for parameter in one.model.parameters()),
        "flops": flops(one.model, size),
        "dense_bytes": len(content),
        "packed_bytes": sum(tensor.nbytes for tensor in pack_weights(weights).values()),
        "zip_bytes": len(zlib.compress(content)),
    }
    return one


def kept_channels(groups: Iterable[ChannelGroup], share: float, multiple: int = 1) -> dict[str, Tensor]:
    """The first channels of each group, so that `share` of its width is gone; one at least stays.

    Its rows are then the nearest multiple of `multiple`, one of it at least, but no more than there are.
    """
    kept = {}
    for group in groups:
        step = group.channels_in(multiple)
        width = max(1, round((group.count - round(share * group.count)) / step)) * step
        kept[group.name] = torch.arange(min(width, group.count))
    return kept


def _with_zeros(model: nn.Module, change: Callable[[Tensor], None], dense: Iterable[nn.Module] = ()) -> nn.Module:
    """A copy whose convolution and linear weights `change` sets zeros in; those of the layers `dense` stay."""
    changed = copy.deepcopy(model)
    kept = {name for name, layer in model.named_modules() if any(layer is one for one in dense)}
    with torch.no_grad():
        for name in sorted(prunable_names(changed)):
            if name.rpartition(".")[0] not in kept:
                change(changed.get_parameter(name))
    return changed


def _smallest(share: float) -> Callable[[Tensor], None]:
    def change(weight: Tensor) -> None:
        size = weight.abs().flatten()
        weight.view(-1)[size.topk(math.floor(share * len(size)), largest=False).indices] = 0.0

    return change


def two_of_four(weight: Tensor) -> None:
    """Set the smaller two of each four neighbours along the input to zero; nothing where there are no fours."""
    if weight.shape[1] % 4 == 0:
        last = weight.movedim(1, -1)
        fours = last.reshape(-1, 4)
        smaller = fours.abs().topk(2, dim=1, largest=False).indices
        weight.copy_(fours.scatter(1, smaller, 0.0).view(last.shape).movedim(-1, 1))
