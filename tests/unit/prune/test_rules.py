"""Rules for layers: the first that matches, each part exact for itself, the rest exact over what remains."""

import copy
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import nn

from toolkit.optim import AdamWPrune, param_groups
from toolkit.prune.groups import prunable_names
from toolkit.prune.rules import prunable_by_rules
from toolkit.prune.schedule import PartsSchedule, Schedule

NAMES = ("stem", "one", "two", "three", "head")
OWN = [{"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "1:4", "score": "magnitude"}, {"score": "obd"}]
RULES = st.sampled_from(["skip", 0.0, 0.31, 0.9, *OWN, {"score": "snr", "sparsity": 0.77}])
EXPRESSIONS = ("stem", "^one", "t", "three|head", "e$", "weight", "o")


def network():
    sizes = (8, 12, 16, 8, 4, 4)
    model = nn.Sequential()
    for name, inputs, outputs in zip(NAMES, sizes[:-1], sizes[1:], strict=True):
        model.add_module(name, nn.Linear(inputs, outputs))
    return model


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def expected(rules):
    """(rule of each layer, None where there is none) by their order."""
    return {f"{name}.weight": next((r for r in rules if re.search(r, f"{name}.weight")), None) for name in NAMES}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(EXPRESSIONS), RULES, min_size=1, max_size=4), st.sampled_from([0.4, 0.7]))
def test_each_part_and_the_rest_are_exact(rules, sparsity):
    torch.manual_seed(0)
    model, first = network(), expected(rules)
    if set(rules) - set(first.values()):
        with pytest.raises(ValueError, match=r"put it first|matches no prunable"):
            param_groups(model, rules=rules)
        return
    parts = {}
    for name, rule in first.items():
        said = {} if rule is None else rules[rule]
        if said != "skip":
            own = {"sparsity": said} if isinstance(said, float) else said
            parts.setdefault(tuple(sorted(own.items())), []).append(name)
    if not parts:
        return
    optimizer = AdamWPrune(param_groups(model, rules=rules), lr=1e-2, sparsity=sparsity, end_step=6, frequency=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 8)
    weights = dict(model.named_parameters())
    total = 0
    for own, names in parts.items():
        zeros, count = sum(int((weights[n] == 0).sum()) for n in names), sum(weights[n].numel() for n in names)
        own = dict(own)
        kept = {"2:4": 2, "1:4": 1}.get(own.get("pattern"))
        share = own.get("sparsity", sparsity) if kept is None else 1 - kept / 4
        assert zeros == math.floor(share * count)
        total += zeros
        if kept:
            assert all(int((weights[n] != 0).view(-1, 4).sum(1).max()) == kept for n in names)
    for name in set(before) - {n for names in parts.values() for n in names}:
        assert not (weights[name] == 0).any()
    assert optimizer.pruning.sparsity() == (total, sum(weights[n].numel() for names in parts.values() for n in names))


@pytest.mark.parametrize("name", ["adamwprune", "sgdprune", "adamw-magnitude", "momentum-movement"])
def test_every_method_takes_rules_and_goes_on_from_its_state(name):
    rules = {"stem": "skip", "three": 0.9, "two": {"pattern": "2:4"}}

    def made():
        torch.manual_seed(0)
        model = network()
        options = {"lr": 1e-2, "sparsity": 0.5, "end_step": 6, "frequency": 2}
        return model, create_optimizer_v2(param_groups(model, rules=rules), name, **options)

    model, optimizer = made()
    train(model, optimizer, 4)
    other, again = made()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, again)):
        train(one, its, 4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    zeros = {key: int((p == 0).sum()) for key, p in model.named_parameters()}
    assert (zeros["stem.weight"], zeros["three.weight"], zeros["two.weight"]) == (0, math.floor(0.9 * 32), 64)
    assert zeros["one.weight"] + zeros["head.weight"] == math.floor(0.5 * (192 + 16))


def test_a_score_of_its_own_decides():
    torch.manual_seed(0)
    model = network()
    optimizer = AdamWPrune(
        param_groups(model, rules={"one": {"score": "magnitude"}}), sparsity=0.5, end_step=1, lr=1e-3
    )
    optimizer.zero_grad()
    model(torch.randn(5, 8)).square().mean().backward()
    before = model.one.weight.detach().clone()
    optimizer.step()
    # The step moves each weight by about lr; those far from the middle are where magnitude has them.
    middle = before.abs().median()
    assert not (model.one.weight[before.abs() > middle + 0.01] == 0).any()
    assert (model.one.weight[before.abs() < middle - 0.01] == 0).all()


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"nosuch": 0.5}, "'nosuch': it matches no prunable parameter; these are head.weight, one.weight"),
        ({"bias": "skip"}, "'bias': it matches no prunable parameter"),
        ({"weight": "skip", "one": 0.5}, "'one': rules before it take all it matches; put it first"),
        ({"one(": "skip"}, "'one(' is no regular expression"),
        ({"one": "skp"}, "'one': 'skp' is not known; give skip, a sparsity, or sparsity, pattern, score by name"),
        ({"one": {"colour": 1}}, "'one': {'colour': 1} is not known"),
        ({"one": {}}, "'one': {} is not known"),
        ({"one": None}, "'one': None is not known"),
        ({"one": 1.0}, "'one': sparsity 1.0 must be in [0, 1)"),
        ({"one": True}, "'one': sparsity True must be in [0, 1)"),
        ({"one": {"pattern": 124}}, "pattern='124' is not known"),
        ({"one": {"pattern": "channel"}}, "'one': channels go through all layers"),
        ({"two": {"pattern": "3:5"}}, "'two': its pattern does not fit two.weight of shape (8, 16)"),
        ({"one": {"pattern": "2:4", "sparsity": 0.9}}, "sparsity=0.9 is not that of pattern=2:4"),
        ({"one": {"score": "fisher"}}, "score='fisher' is not known here"),
    ],
)
def test_rules_that_cannot_be(rules, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        AdamWPrune(param_groups(network(), rules=rules), sparsity=0.5, end_step=3)


def test_rules_do_nothing_where_pruning_is_off():
    AdamWPrune(param_groups(network(), rules={"one": "skip"}), sparsity=0)
    with pytest.raises(ValueError, match="a rule asks for pruning, which sparsity 0 switches off; give a sparsity"):
        AdamWPrune(param_groups(network(), rules={"one": 0.9}), sparsity=0)
    AdamWPrune(param_groups(network(), rules={"one": 0.9, ".": "skip"}), sparsity=0.5, end_step=3)


def test_a_method_with_one_score_has_no_other():
    groups = param_groups(network(), rules={"one": {"score": "displacement"}})
    with pytest.raises(ValueError, match="score='displacement' is not known here; choose one of movement"):
        create_optimizer_v2(groups, "adamw-movement", lr=0.1, sparsity=0.5, end_step=3)


def test_what_the_optimizers_pattern_leaves_dense_a_rule_may_take():
    model = network()
    found = prunable_by_rules(model, {"head": {"pattern": "1:2"}}, "2:4")
    assert {name: own for name, own in found.items() if own} == {"head.weight": {"pattern": "1:2"}}
    assert found.keys() == prunable_names(model, "2:4") | {"head.weight"}


def test_the_schedule_of_parts():
    whole = PartsSchedule.of([(Schedule(0.7, 0, 10, 5), 101), (Schedule(0.9, 0, 10, 5), 33)])
    wanted = math.floor(0.7 * 101) + math.floor(0.9 * 33)
    assert whole.num_zeros_at(10, 134) == wanted
    assert whole.sparsity_at(10) == whole.sparsity == wanted / 134
    assert whole.sparsity_at(0) == 0
    assert whole.is_reached(wanted, 134)
    assert not whole.is_reached(wanted + 1, 134)
