"""--prune-shrink: from the last mask update on a run goes on with the model that is left."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.builder.data import example_input
from toolkit.builder.optimizer import prunable_weights
from toolkit.builder.process import start_of
from toolkit.config import Config
from toolkit.dist import World
from toolkit.engine.checkpoint import load_state
from toolkit.errors import blaming
from toolkit.prune.channels import ChannelGroup, channel_groups
from toolkit.prune.dead import nonzero_channels
from toolkit.prune.schedule import Schedule
from toolkit.shrink import Layers, check_layers, cut, cut_tensor, shrink


@dataclass(frozen=True)
class Smaller:
    """What a checkpoint says of a shrunk run: what is left of each layer, and how many weights pruning counts as gone.

    `cut` takes a tensor of the whole model, or of its optimizer, by the name of its parameter.
    """

    layers: Layers
    removed_weights: int

    @property
    def cut(self) -> Callable[[str, Tensor], Tensor]:
        """Leaves of a tensor what is left of its layer."""
        return partial(cut_tensor, self.layers)

    def saved(self) -> dict[str, Any]:
        """As plain values."""
        return {"layers": self.layers, "removed_weights": self.removed_weights}


def smaller_of(config: Config, model: nn.Module) -> Smaller:
    """The bare model of a run without the channels all whose weights are zero."""
    groups = channel_groups(model, example_input(config, model))
    left = {group.name: _left(model, group) for group in groups}
    keep = {name: marks.nonzero().view(-1) for name, marks in left.items() if not marks.all()}
    less, plan = shrink(model, groups, keep)
    counts = [sum(weight.numel() for _, weight in prunable_weights(one, config)) for one in (model, less)]
    return Smaller(plan.layers, counts[0] - counts[1])


def _left(model: nn.Module, group: ChannelGroup) -> Tensor:
    """bool [count]: the channels of which a weight is not zero."""
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
    left = torch.zeros(group.count, dtype=torch.bool, device="cpu")
    for one in group.slices:
        if one.name in weights:
            left |= nonzero_channels(weights[one.name], one)
    return left


def shrink_as_before(model: nn.Module, config: Config, world: World) -> Smaller | None:
    """Cut a new model as that of the checkpoint is which the run goes on from; None where that is whole."""
    if config.resume == "auto" and not config.prune_shrink:
        return None  # a run goes on in its folder with its own settings; its files are read once then
    checkpoint = start_of(config, world)
    return None if checkpoint is None else cut_as_saved(model, checkpoint)


def settings_of_the_rest(
    config: Config, schedule: Schedule, smaller: Smaller | None, model: nn.Module
) -> tuple[Config, Schedule]:
    """What goes for the optimizer: a smaller model is pruned no more, and --state-budget is as many bytes as before."""
    if smaller is None:
        return config, schedule
    if not isinstance(config.state_budget, float):
        return config, Schedule()
    left = sum(weight.numel() for _, weight in prunable_weights(model, config))
    budget = config.state_budget * (left + smaller.removed_weights) / left
    return dataclasses.replace(config, state_budget=budget), Schedule()


def cut_as_saved(model: nn.Module, checkpoint: Path) -> Smaller | None:
    """Cut a new model as a checkpoint's is; returns what that says of it, None where it is whole."""
    saved = load_state(checkpoint).get("smaller")
    if saved is None:
        return None
    with blaming(f"{checkpoint} says of a smaller model what does not fit", "take another checkpoint"):
        cut(model, check_layers(saved["layers"]))
        return Smaller(saved["layers"], int(saved["removed_weights"]))
