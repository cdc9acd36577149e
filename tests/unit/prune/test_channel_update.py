"""Whole channels: exact, the cheapest first, never a layer's last, with whatever method and model."""

import copy
import math
from itertools import product

import pytest
import timm
import torch
from channel_chain import chain, gradients, make

from toolkit.optim import AdamWPrune, param_groups
from toolkit.optim.sgdprune import SGDPrune
from toolkit.prune.hooks import pruned_by_hooks

METHODS = {
    "state": lambda params, **options: AdamWPrune(params, lr=1e-3, **options),
    "budget": lambda params, **options: AdamWPrune(params, lr=1e-3, state_budget="auto", **options),
    "sgd-state": lambda params, **options: SGDPrune(params, lr=1e-2, momentum=0.9, **options),
    **{
        score: lambda params, score=score, **options: pruned_by_hooks(
            torch.optim.AdamW, "magnitude" if score == "magnitude" else "movement"
        )(params, lr=1e-3, score=score, **options)
        for score in ("magnitude", "movement", "displacement")
    },
}
MODELS = {
    "resnet10t": lambda: timm.create_model("resnet10t", channels=(8, 16, 16, 32), num_classes=10),
    "vit_tiny_patch16_224": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_classes=10
    ),
}

ONE_OF_EACH = {
    ("resnet10t", "state", "global"),
    ("resnet10t", "movement", "global"),
    ("resnet10t", "sgd-state", "layer"),
    ("vit_tiny_patch16_224", "sgd-state", "global"),
    ("vit_tiny_patch16_224", "magnitude", "global"),
    ("vit_tiny_patch16_224", "movement", "layer"),
}


def removed(model, group):
    """bool [count]: channels of which nothing is left in any weight."""
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
    left = torch.zeros(group.count, dtype=torch.int64)
    for one in group.slices:
        if one.name in weights:
            nonzero = (weights[one.name] != 0).movedim(one.axis, 0).flatten(1).sum(1)
            left += nonzero[one.places].sum(1)
    return left == 0


@pytest.mark.parametrize(
    ("model", "method", "scope"),
    [
        pytest.param(*case, marks=() if case in ONE_OF_EACH else pytest.mark.long)
        for case in product(MODELS, METHODS, ("global", "layer"))
    ],
)
def test_every_update_takes_as_many_whole_channels_as_the_target_has_room_for(model, method, scope):
    torch.manual_seed(0)
    net = MODELS[model]()
    groups = param_groups(net, pattern="channel", example_input=torch.randn(1, 3, 32, 32))
    channels = groups[-1]["channels"]
    optimizer = METHODS[method](groups, pattern="channel", sparsity=0.5, end_step=6, frequency=2, scope=scope)
    assert all("channels" not in group for group in optimizer.param_groups)
    before = None
    for step in range(1, 9):
        gradients(net.parameters(), step)
        optimizer.step()
        zeros, weights = optimizer.pruning.sparsity()
        if step not in (2, 4, 6):
            continue
        wanted = math.floor(0.5 * (1 - (1 - step / 6) ** 3) * weights)
        gone = [removed(net, group) for group in channels]
        assert all(not bool(marks.all()) for marks in gone)
        # Another channel, whichever, is larger than the room that is left.
        largest = max(_weights_of(net, group) for group in channels)
        assert wanted - largest < zeros <= wanted
        if scope == "layer":  # there is a share from which no layer is more than half a channel away
            least, most = (
                [(int(marks.sum()) + half) / len(marks) for marks in gone if int(marks.sum()) < len(marks) - 1]
                for half in (0.5, -0.5)
            )
            assert max(most) <= min(least)
        # Nothing else is zero: what is not of a removed channel is as large as the model without them.
        alive = {name: torch.ones_like(p, dtype=torch.bool) for name, p in net.named_parameters() if p.ndim > 1}
        for group, marks in zip(channels, gone, strict=True):
            for one in group.slices:
                if one.name in alive:
                    alive[one.name].index_fill_(one.axis, one.places[marks].flatten(), False)
        prunable = {name for g in optimizer.param_groups if g["prunable"] for name in g["param_names"]}
        assert sum(int((~alive[name]).sum()) for name in prunable) == zeros
        if before is not None:
            assert all(bool(now[old].all()) for now, old in zip(gone, before, strict=True))
        before = gone
    assert sum(int(marks.sum()) for marks in before)


def _weights_of(net, group):
    """Weights of one channel while all of the model is there."""
    weights = {name: parameter for name, parameter in net.named_parameters() if parameter.ndim > 1}
    return sum(
        one.places.shape[1] * weights[one.name].numel() // weights[one.name].shape[one.axis]
        for one in group.slices
        if one.name in weights
    )


def test_heads_are_multiples_by_their_rows():
    torch.manual_seed(0)
    net = MODELS["vit_tiny_patch16_224"]()  # 3 heads of 16 rows, 192 hidden units
    groups = param_groups(net, pattern="channel", example_input=torch.randn(1, 3, 32, 32))
    channels = groups[-1]["channels"]
    options = {"pattern": "channel", "sparsity": 0.4, "end_step": 1, "scope": "layer", "channel_multiple": 32}
    optimizer = METHODS["magnitude"](groups, **options)
    gradients(net.parameters(), 0)
    optimizer.step()
    left = {group.name: group.count - int(removed(net, group).sum()) for group in channels}
    assert left == {"blocks.0.attn.qkv": 2, "blocks.0.mlp.fc1": 96, "blocks.1.attn.qkv": 2, "blocks.1.mlp.fc1": 96}


def test_how_many_each_layer_loses_is_not_a_matter_of_scores_or_of_the_ramp():
    counts = set()
    for end_step, make_optimizer in enumerate(METHODS.values(), 1):
        torch.manual_seed(end_step)
        net = MODELS["resnet10t"]()
        groups = param_groups(net, pattern="channel", example_input=torch.randn(1, 3, 32, 32))
        channels = groups[-1]["channels"]
        options = {"pattern": "channel", "sparsity": 0.6, "end_step": end_step, "frequency": 1, "scope": "layer"}
        optimizer = make_optimizer(groups, **options)
        for step in range(end_step):
            gradients(net.parameters(), step)
            optimizer.step()
        counts.add(tuple(int(removed(net, group).sum()) for group in channels))
    assert len(counts) == 1


@pytest.mark.parametrize(("kind", "stop"), [("state", 3), ("movement", 7)])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(kind, stop):
    def make_run():
        torch.manual_seed(0)
        net = MODELS["resnet10t"]()
        groups = param_groups(net, pattern="channel", example_input=torch.randn(1, 3, 32, 32))
        return net, METHODS[kind](groups, pattern="channel", sparsity=0.5, end_step=6, frequency=2)

    def run(net, optimizer, steps):
        for step in steps:
            gradients(net.parameters(), step)
            optimizer.step()

    whole, one = make_run()
    run(whole, one, range(9))
    first, other = make_run()
    run(first, other, range(stop))
    second, again = make_run()
    second.load_state_dict(first.state_dict())
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    run(second, again, range(stop, 9))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["state", "magnitude"])
def test_a_copy_knows_its_channels(kind):
    parameters, groups = chain()
    marked = {"params": list(parameters.items()), "prunable": True, "channels": list(groups)}
    optimizer = METHODS[kind]([marked], pattern="channel", sparsity=0.5, end_step=1)
    again = copy.deepcopy(optimizer)
    assert [group.name for group in again.pruning.channels] == ["a", "b"]
    for one in (optimizer, again):
        gradients(one.param_groups[0]["params"], 0)
        one.step()
    for a, b in zip(optimizer.param_groups[0]["params"], again.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


def test_errors_say_what_to_do():
    parameters, groups = chain()
    with pytest.raises(ValueError, match=r"pattern='channel' needs to know which channels go together.*param_groups"):
        AdamWPrune(list(parameters.items()), pattern="channel", sparsity=0.5, end_step=1)
    with pytest.raises(ValueError, match=r"needs example_input"):
        param_groups(MODELS["resnet10t"](), pattern="channel")
    for multiple, pattern in ((0, "channel"), (2.5, "channel"), (8, "weight")):
        with pytest.raises(ValueError, match=f"channel_multiple={multiple} with pattern='{pattern}': it is 1"):
            AdamWPrune(parameters.values(), pattern=pattern, sparsity=0.5, end_step=1, channel_multiple=multiple)
    for option in ({"regrow": 0.1}, {"scope": "erk"}):
        with pytest.raises(ValueError, match="leave out regrow, and choose scope global or layer"):
            AdamWPrune(list(parameters.items()), pattern="channel", sparsity=0.5, end_step=1, **option)
    with pytest.raises(ValueError, match="no channels of this model can go"):
        make(parameters, [], sparsity=0.5, end_step=3)
    with pytest.raises(ValueError, match="channel_multiple=512: no layer has more channels"):
        make(parameters, groups, sparsity=0.5, end_step=3, channel_multiple=512)
    optimizer = make(parameters, groups, sparsity=0.05, end_step=1)
    gradients(parameters.values(), 0)
    with pytest.raises(ValueError, match=r"sparsity=0.05 of 69 weights is less than any one channel"):
        optimizer.step()
    optimizer = AdamWPrune(
        [{"params": list(parameters.items()), "prunable": True, "channels": groups}],
        pattern="channel",
        sparsity=0.5,
        end_step=1,
    )
    parameters["b"].grad = None
    with pytest.raises(ValueError, match="b is prunable but had no gradient by step 1"):
        optimizer.step()
    parameters, groups = chain()
    optimizer = make(parameters, groups, sparsity=0.5, end_step=3)
    optimizer.pruning.keep_zeros()
    with torch.no_grad():
        parameters["b"][0, 0] = 0.0
    gradients(parameters.values(), 0)
    with pytest.raises(ValueError, match="the zeros at hand are not whole channels"):
        optimizer.step()
    parameters, groups = chain()
    optimizer = make(parameters, groups, sparsity=0.5, end_step=1)
    with torch.no_grad():
        parameters["c"][1, 1] = torch.nan
    gradients(parameters.values(), 0)
    with pytest.raises(ValueError, match="the pruning score of c is not finite"):
        optimizer.step()


def test_frozen_layers_keep_their_channels():
    net = MODELS["resnet10t"]()
    net.layer1[0].conv2.weight.requires_grad_(False)
    channels = param_groups(net, pattern="channel", example_input=torch.randn(1, 3, 32, 32))[-1]["channels"]
    assert all("layer1.0.conv2.weight" not in {one.name for one in group.slices} for group in channels)
    assert "layer2.0.conv1" in {group.name for group in channels}


def test_the_same_groups_make_two_optimizers():
    """What a caller gave stays as it was."""
    net = MODELS["resnet10t"]()
    groups = param_groups(net, pattern="channel", example_input=torch.randn(1, 3, 32, 32))
    for kind in ("state", "magnitude"):
        optimizer = METHODS[kind](groups, pattern="channel", sparsity=0.5, end_step=1)
        assert optimizer.pruning.channels == groups[-1]["channels"]


def test_a_budget_ends_at_float32_though_channels_fall_short():
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", channels=(32, 64, 64, 128), num_classes=10)
    groups = param_groups(net, pattern="channel", example_input=torch.randn(1, 3, 32, 32))
    optimizer = METHODS["budget"](groups, pattern="channel", sparsity=0.7, end_step=4, frequency=2)
    for step in range(1, 6):
        gradients(net.parameters(), step)
        optimizer.step()
    dtypes = {state["exp_avg"].dtype for state in optimizer.state.values()}
    assert dtypes == {torch.float32}
