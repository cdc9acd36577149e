"""Models with something in every tensor, and channels zeroed by their slices."""

import copy

import torch
from torch import nn


def randomise(model, seed=0):
    """BatchNorm, biases and scales that hide nothing; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
            elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                module.bias.normal_(0, 0.1, generator=generator)
            if isinstance(getattr(module, "gamma", None), nn.Parameter):
                module.gamma.uniform_(0.5, 1.0, generator=generator)
    return model.eval()


def random_keep(groups, share, seed=0):
    """Of each group a random part of the channels, at least one."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group.name: torch.randperm(group.count, generator=generator)[: max(1, int(group.count * share))].sort().values
        for group in groups
    }


def zeroed(model, groups, keep):
    """A copy in which all other channels' places in convolution and linear weights are zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for group in groups:
            gone = torch.ones(group.count, dtype=torch.bool)
            gone[keep[group.name]] = False
            for one in group.slices:
                layer = model.get_submodule(one.name.rpartition(".")[0])
                if one.name.endswith(".weight") and isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.weight.index_fill_(one.axis, one.places[gone].view(-1), 0.0)
    return model


def difference(one, other, images):
    """Largest difference of two models' outputs, as a part of the largest output."""
    with torch.no_grad():
        first, second = one(images), other(images)
    return float((first - second).abs().max() / first.abs().max().clamp(min=1))
