"""Layers in a row whose channels go together, made by hand, and an optimizer that prunes them by magnitude."""

import torch
from torch import nn

from toolkit.prune.channels import ChannelGroup, ChannelSlice
from toolkit.prune.hooks import pruned_by_hooks


def gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def chain():
    """Three layers: 4 inputs, 6 and 5 hidden channels, 3 outputs."""
    torch.manual_seed(1)
    weights = {"a": torch.randn(6, 4), "b": torch.randn(5, 6), "c": torch.randn(3, 5)}
    parameters = {name: nn.Parameter(weight) for name, weight in weights.items()}

    def one(name, axis, count):
        return ChannelSlice(name, axis, torch.arange(count).unsqueeze(1))

    groups = [
        ChannelGroup("a", 6, (one("a", 0, 6), one("b", 1, 6))),
        ChannelGroup("b", 5, (one("b", 0, 5), one("c", 1, 5))),
    ]
    return parameters, groups


def make(parameters, groups, **options):
    marked = {"params": list(parameters.items()), "prunable": True, "channels": list(groups)}
    kind = pruned_by_hooks(torch.optim.SGD, "magnitude")
    return kind([marked], lr=0.0, pattern="channel", frequency=1, **options)
