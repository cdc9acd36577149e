"""The public way to parameter groups: timm's rule of decay, our mark, every trainable parameter once."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from toolkit.optim import AdamWPrune, param_groups
from toolkit.prune.groups import prunable_names, prunable_parameters


def ids(groups, wanted):
    found = [id(p) for group in groups if wanted(group) for p in group["params"]]
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "mixer_s32_224", "levit_128s"])
def test_decay_is_timms_rule(name):
    model = timm.create_model(name)
    ours = torch.optim.AdamW(param_groups(model, 0.3)).param_groups
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = param_groups_weight_decay(model, 0.3, no_weight_decay_list=exempt)
    for decay in (0.0, 0.3):
        assert ids(ours, lambda g, d=decay: g["weight_decay"] == d) == ids(
            theirs, lambda g, d=decay: g["weight_decay"] == d
        )
    parameters = dict(model.named_parameters())
    assert ids(ours, lambda g: g["prunable"]) == {id(parameters[name]) for name in prunable_names(model)}
    for group in ours:
        for parameter, name in zip(group["params"], group["param_names"], strict=True):
            assert parameters[name] is parameter


LAYERS = {
    "linear": lambda: nn.Linear(3, 3),
    "convolution": lambda: nn.Conv2d(3, 3, 1, bias=False),
    "norm": lambda: nn.BatchNorm2d(3),
    "embedding": lambda: nn.Embedding(3, 3),
    "attention": lambda: nn.MultiheadAttention(4, 2),
}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(LAYERS)), st.booleans(), st.booleans()), min_size=1, max_size=6),
    st.sampled_from([None, 0.0, 0.1]),
)
def test_every_trainable_parameter_stands_once(plan, weight_decay):
    layers = []
    for kind, frozen, again in plan:
        layer = LAYERS[kind]().requires_grad_(not frozen)
        layers += [layer, layer] if again else [layer]  # a layer used twice
    model = nn.ModuleList(layers)
    groups = param_groups(model, weight_decay)
    named = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in named) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert len({id(parameter) for _, parameter in named}) == len(named)
    assert len(groups) <= 4
    for group in groups:
        decays = group.get("weight_decay", "the optimizer's") != 0
        for name, parameter in group["params"]:
            assert group["prunable"] == (name in prunable_names(model))
            assert decays == (parameter.ndim > 1 and weight_decay != 0)


def test_without_an_argument_the_optimizers_weight_decay_is_in_force():
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2))
    groups = AdamWPrune(param_groups(model), weight_decay=0.2).param_groups
    assert [(g["prunable"], g["weight_decay"], g["param_names"]) for g in groups] == [
        (False, 0.0, ["0.bias"]),
        (False, 0.2, ["1.weight"]),
        (True, 0.2, ["0.weight"]),
    ]


def test_an_embedding_and_the_head_tied_to_it_stay_dense():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False))
    model[2].weight = model[0].weight
    optimizer = AdamWPrune(param_groups(model), lr=1e-3, sparsity=0.5, end_step=3, frequency=1)
    assert [name for name, _ in prunable_parameters(optimizer.param_groups)] == ["1.weight"]
    for _ in range(3):
        model(torch.arange(10)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int((model[0].weight == 0).sum()) == 0
    assert int((model[1].weight == 0).sum()) == 32


def test_a_tied_head_is_said_once(caplog):
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    model[1].weight = model[0].weight
    with caplog.at_level("INFO", logger="toolkit"):
        param_groups(model)
    assert caplog.messages == ["1.weight is not pruned: it is the embedding 0.weight"]


@pytest.mark.parametrize("name", ["adamwprune", "sgdprune", "adamw-movement", "momentum-movement", "adamw-magnitude"])
@pytest.mark.parametrize(
    "normed", [nn.utils.weight_norm, weight_norm, spectral_norm, orthogonal], ids=lambda f: f.__module__
)
def test_computed_weights_stay_dense_and_are_named(name, normed, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(normed(nn.Conv2d(3, 8, 3)), nn.Flatten(), normed(nn.Linear(288, 10)), nn.Linear(10, 10))
    optimizer = create_optimizer_v2(param_groups(model), name, lr=1e-3, sparsity=0.5, end_step=6, frequency=2)
    assert caplog.messages == ["not pruned, for they are computed from other parameters: 0.weight, 2.weight"]
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert optimizer.pruning.sparsity() == (50, 100)
    assert int((model[0].weight == 0).sum()) == int((model[2].weight == 0).sum()) == 0


def test_recurrent_layers_stay_dense_and_are_named_once(caplog):
    plain = [nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell]
    model = nn.Sequential(nn.LSTM(6, 5, proj_size=3), *(kind(6, 5) for kind in plain), nn.Linear(5, 4))
    groups = param_groups(model)
    (said,) = caplog.messages
    weights = 20 * (6 + 3) + 3 * 5 + (3 + 1 + 4 + 3 + 1) * 5 * (6 + 5)
    assert said.startswith(f"not pruned, for they are recurrent layers: 0, 1, 2, 3, 4, 5 ({weights} weights); give ")
    assert "prunable=True" in said
    assert [name for group in groups if group["prunable"] for name, _ in group["params"]] == ["6.weight"]


def test_a_model_without_recurrent_layers_is_told_nothing(caplog):
    param_groups(nn.Sequential(nn.Linear(5, 4), nn.Embedding(3, 4), nn.MultiheadAttention(4, 2)))
    assert not caplog.messages


@pytest.mark.parametrize("name", ["adamwprune", "sgdprune", "adamw-movement"])
def test_recurrent_layers_are_pruned_where_a_group_says_so(name):
    """The remedy that the message gives."""
    layer = nn.LSTM(6, 5)
    matrices, vectors = ([p for p in layer.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "prunable": True}, {"params": vectors, "prunable": False}]
    optimizer = create_optimizer_v2(groups, name, lr=1e-3, sparsity=0.7, end_step=6, frequency=2)
    for _ in range(8):
        optimizer.zero_grad()
        layer(torch.randn(3, 6))[0].square().mean().backward()
        optimizer.step()
    assert optimizer.pruning.sparsity() == (154, 220)


@pytest.mark.parametrize("name", ["adamwprune", "sgdprune", "adamw-movement", "adamw-magnitude"])
def test_what_a_weight_is_computed_from_is_pruned_where_a_group_says_so(name):
    """A direction of `weight_norm` that is 0 is a weight that is 0."""
    torch.manual_seed(0)
    layer = weight_norm(nn.Linear(20, 10))
    length, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    groups = [{"params": [direction], "prunable": True}, {"params": [length, layer.bias], "prunable": False}]
    optimizer = create_optimizer_v2(groups, name, lr=1e-3, sparsity=0.7, end_step=6, frequency=2)
    for _ in range(8):
        optimizer.zero_grad()
        layer(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
    assert int((layer.weight == 0).sum()) == 140
