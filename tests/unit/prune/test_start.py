"""A sparse start: how many zeros, which, and that what is kept is never more than they leave room for."""

import copy

import numpy as np
import pytest
import torch
from coded import model, take_gradients
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2

from toolkit.optim import AdamWPrune, param_groups
from toolkit.prune.budget import KeptSizes
from toolkit.prune.start import start_quotas, zero_smallest

KINDS = ["adamwprune", "sgdprune", "adamwspam-state", "adamw-magnitude", "momentum-movement"]
SIZES = (3 * 40 * 9, 40 * 33 * 9, 33 * 16 * 50)
SCHEDULE = {"sparsity": 0.9, "begin_step": 2, "end_step": 8, "frequency": 2}


def build(kind, net=None, start=0.5, **options):
    net = net or model()
    optimizer = create_optimizer_v2(param_groups(net, 1e-2), kind, lr=2e-3, **SCHEDULE, **options)
    if start:
        optimizer.pruning.start_sparse(start)
    return net, optimizer


def train(net, optimizer, first, last):
    for step in range(first, last + 1):
        take_gradients(net, step)
        optimizer.step()


def weights(net):
    return [parameter for parameter in net.parameters() if parameter.ndim > 1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_zeros_are_there_from_the_first_step_and_the_ramp_adds_to_them(kind):
    net, optimizer = build(kind)
    whole = build(kind, start=0)[0]
    quotas = start_quotas([tuple(weight.shape) for weight in weights(net)], 0.5)
    assert sum(quotas) == sum(SIZES) // 2 == optimizer.pruning.sparsity()[0]
    for weight, before, zeros in zip(weights(net), weights(whole), quotas, strict=True):
        order = np.sort(before.detach().abs().numpy(), axis=None)
        assert torch.equal(weight == 0, before.abs() < float(order[zeros]))
        assert torch.equal(weight[weight != 0], before[weight != 0])
    gone = [weight == 0 for weight in weights(net)]
    for step in range(1, 11):
        train(net, optimizer, step, step)
        zeros = optimizer.pruning.sparsity()[0]
        assert zeros == max(sum(SIZES) // 2, optimizer.pruning.schedule.num_zeros_at(step - step % 2, sum(SIZES)))
        if kind != "momentum-movement":  # whose pruned weights may come back
            assert all(bool((weight[at] == 0).all()) for weight, at in zip(weights(net), gone, strict=True))
    assert zeros == int(0.9 * sum(SIZES))


@pytest.mark.parametrize(("kind", "moments"), [("adamwprune", 2), ("sgdprune", 1)])
def test_the_state_is_never_dense_and_auto_is_what_the_start_leaves(kind, moments):
    net, optimizer = build(kind, state_budget="auto")
    sizes, half = KeptSizes(SIZES, moments), sum(SIZES) - sum(SIZES) // 2
    limit = max(sizes.nbytes("int8", half), sizes.nbytes("float32", sum(SIZES) - int(0.9 * sum(SIZES))))
    assert limit < sizes.nbytes("int8", sum(SIZES))
    seen = []
    for step in range(1, 11):
        train(net, optimizer, step, step)
        states = [optimizer.state[weight] for weight in weights(net)]
        assert all("mask" in state for state in states)
        kept = sum(value.nbytes for state in states for key, value in state.items() if key != "step")
        assert kept <= limit
        seen.append(states[-1][optimizer.MOMENTS[0]].dtype)
    assert (seen[0], seen[-1]) == (torch.uint8, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 5])
def test_resume_equals_not_stopping(kind, at):
    options = {"state_budget": "auto", "regrow": 0.2} if kind == "adamwprune" else {}
    net, optimizer = build(kind, **options)
    train(net, optimizer, 1, at)
    other, again = build(kind, **options)  # as a run that goes on: its start first, then what was saved
    other.load_state_dict(net.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, at + 1, 10)
    train(other, again, at + 1, 10)
    assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_a_constant_sparsity_with_regrowth_is_as_rigl_trains():
    """All zeros at the start, and exchanges until end_step: their number never changes, their places do."""
    net, optimizer = build("sgdprune", start=0.9, regrow=0.3, score="magnitude")
    before = [weight == 0 for weight in weights(net)]
    for step in range(1, 11):
        train(net, optimizer, step, step)
        assert sum(map(optimizer.survivors, weights(net))) == sum(SIZES) - int(0.9 * sum(SIZES))
    assert optimizer.pruning.sparsity()[0] == int(0.9 * sum(SIZES))
    assert not all(torch.equal(weight == 0, gone) for weight, gone in zip(weights(net), before, strict=True))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_what_is_nearest_0_goes_and_of_equal_ones_the_first(values, data):
    count = data.draw(st.integers(0, len(values)))
    weight = torch.tensor(values, dtype=torch.float32)
    expected = np.array(values, dtype=np.float32)
    expected[np.argsort(np.abs(expected), kind="stable")[:count]] = 0
    zero_smallest(weight, count)
    assert weight.tolist() == expected.tolist()


def test_bad_starts_are_one_line():
    with pytest.raises(ValueError, match="no larger than the end"):
        build("adamwprune", start=0.95)
    net, optimizer = build("adamwprune")
    train(net, optimizer, 1, 1)
    with pytest.raises(ValueError, match="before the first step"):
        optimizer.pruning.start_sparse(0.6)
    net, optimizer = build("sgd-magnitude", start=0, momentum=0.0, nesterov=False)  # keeps no state till it prunes
    train(net, optimizer, 1, 1)
    with pytest.raises(ValueError, match="before the first step"):
        optimizer.pruning.start_sparse(0.6)
    optimizer = AdamWPrune(param_groups(net, pattern="2:4"), pattern="2:4", end_step=5)
    with pytest.raises(ValueError, match="single weights"):
        optimizer.pruning.start_sparse(0.3)


def test_a_start_that_is_refused_has_changed_nothing():
    """Its first part would fit, the second ends below it."""
    net, _ = build("adamwprune", start=0)
    before = copy.deepcopy(net.state_dict())
    optimizer = AdamWPrune(param_groups(net, rules={"^4": 0.4}), **SCHEDULE)
    with pytest.raises(ValueError, match=r"sparsity=0\.4"):
        optimizer.pruning.start_sparse(0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_weights_that_begin_at_0_are_not_taken_for_pruned_unaware():
    """As timm's heads that begin at 0: pruned from the first step on they would never learn."""
    net, _ = build("adamwprune", start=0)
    with torch.no_grad():
        net[4].weight.zero_()
    with pytest.raises(ValueError, match=r"4\.weight has 26400 zeros of its own, a start at 0\.5 asks for \d+ of it"):
        build("adamwprune", net)


@pytest.mark.parametrize("start", [0.3, 0.5, 0.7])
def test_a_pruned_models_own_zeros_are_among_those_of_the_start(start):
    """Layers that have more than Erdos-Renyi-Kernel densities leave them: the others get less."""
    net, optimizer = build("adamwprune", start=0)
    with torch.no_grad():
        net[0].weight[:30] = 0
        net[2].weight[:8] = 0
        net[4].weight[:15] = 0
    gone = [weight == 0 for weight in weights(net)]
    own = sum(int(marks.sum()) for marks in gone)
    optimizer.pruning.keep_zeros()
    optimizer.pruning.start_sparse(start)
    train(net, optimizer, 1, 1)
    assert optimizer.pruning.sparsity()[0] == max(own, int(start * sum(SIZES)))
    assert all(bool((weight[marks] == 0).all()) for weight, marks in zip(weights(net), gone, strict=True))
