"""Three patterns, three methods, two kinds of model: each exact in its own unit, and trained on without a change."""

import math

import pytest
import timm
import torch

from toolkit.optim import AdamWPrune, param_groups
from toolkit.prune.hooks import pruned_by_hooks
from toolkit.prune.patterns import n_of_m

MODELS = {
    "resnet10t": lambda: timm.create_model("resnet10t", channels=(8, 16, 16, 32), num_classes=10),
    "vit_tiny_patch16_224": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_classes=10
    ),
}
METHODS = {
    "state": AdamWPrune,
    "magnitude": pruned_by_hooks(torch.optim.AdamW, "magnitude"),
    "movement": pruned_by_hooks(torch.optim.AdamW, "movement"),
}
PATTERNS = {"weight": {"sparsity": 0.6}, "2:4": {}, "3:8": {}, "channel": {"sparsity": 0.4}}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "pattern", [pytest.param(name, marks=pytest.mark.long) if name == "3:8" else name for name in PATTERNS]
)
def test_a_model_ends_at_its_pattern_and_stays_there(pattern, method, model):
    torch.manual_seed(0)
    net, images = MODELS[model](), torch.randn(4, 3, 32, 32)
    groups = param_groups(net, pattern=pattern, example_input=images)
    optimizer = METHODS[method](groups, lr=1e-3, pattern=pattern, end_step=6, frequency=3, **PATTERNS[pattern])
    found = []
    for _ in range(9):
        net(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(optimizer.pruning.sparsity())
    zeros, weights = found[-1]
    kind = n_of_m(pattern)
    if kind is not None:
        assert zeros == weights * kind.gone // kind.size
        names = {name for group in optimizer.param_groups if group["prunable"] for name in group["param_names"]}
        for name, parameter in net.named_parameters():
            if name in names:
                grouped = (parameter != 0).view(len(parameter), -1, kind.size, *parameter.shape[2:]).sum(2)
                assert (grouped == kind.kept).all(), name
    elif pattern == "weight":
        assert zeros == math.floor(0.6 * weights)
    else:
        assert 0.37 * weights < zeros <= 0.4 * weights
    assert found[1] == (0, weights)
    assert found[5:] == [found[5]] * 4
