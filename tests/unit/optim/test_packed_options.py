"""Scope, regrowth, state dtype: what packed optimizers share, tried on AdamWPrune and SGDPrune; SGDPrune beside SGD."""

import copy
import math

import pytest
import torch
from packed import KINDS, PRUNING, parameters, prunable, run, total, zeros
from torch import nn

from toolkit.kernels.rounding import round_to_bfloat16
from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.sgdprune import SGDPrune


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.8, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    ],
)
def test_sgdprune_at_sparsity_0_is_torchs_sgd_bit_for_bit(options):
    mine, theirs = parameters(), parameters()
    optimizer = SGDPrune(mine, lr=0.05, implementation="reference", **options)
    run(optimizer, mine, 30)
    run(torch.optim.SGD(theirs, lr=0.05, foreach=False, **options), theirs, 30)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_sgdprune_decoupled_decay():
    mine, theirs = parameters(), parameters()
    run(SGDPrune(mine, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True, implementation="reference"), mine, 5)
    plain = torch.optim.SGD(theirs, lr=0.05, momentum=0.9, foreach=False)
    for step in range(5):
        with torch.no_grad():
            for weight in theirs:
                weight.mul_(1 - 0.05 * 0.1)
        run(plain, theirs, 1, first=step)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_sgdprune_keeps_a_third_of_sgds_state():
    weight = nn.Parameter(torch.randn(1024, 512))
    optimizer = SGDPrune([weight], sparsity=0.7, end_step=2, frequency=1)
    run(optimizer, [weight], 3)
    kept = sum(value.untyped_storage().nbytes() for value in optimizer.state[weight].values())
    assert kept / weight.numel() <= 1.34


def test_sgdprune_needs_momentum():
    with pytest.raises(ValueError, match="use sgd-magnitude"):
        SGDPrune(parameters(), momentum=0.0)


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("regrow", [0.0, 0.3])
@pytest.mark.parametrize("score", ["magnitude", "saliency"])
def test_every_combination_reaches_its_target(kind, options, scope, regrow, score):
    weights = parameters(layout=torch.channels_last)
    optimizer = kind(weights, **options, **PRUNING, scope=scope, regrow=regrow, score=score)
    run(optimizer, weights, 25)
    assert zeros(weights) == math.floor(0.8 * total(weights))
    assert all((weight != 0).any() for weight in weights)
    if scope == "layer":
        for weight in prunable(weights):
            assert abs(int((weight == 0).sum()) - 0.8 * weight.numel()) <= 1


def test_global_scope_empties_no_layer():
    weights = parameters()
    with torch.no_grad():
        weights[3].mul_(1e-6)  # by magnitude the first to go, all of it
    optimizer = AdamWPrune(weights, lr=1e-9, score="magnitude", **PRUNING)
    run(optimizer, weights, 21)
    assert int((weights[3] != 0).sum()) == 1
    assert zeros(weights) == math.floor(0.8 * total(weights))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_regrowth_takes_the_largest_gradients_and_starts_gently(kind, options):
    weights = parameters()
    settings = {"sparsity": 0.8, "begin_step": 0, "end_step": 40, "frequency": 10, "regrow": 0.4}
    optimizer = kind(weights, **options, **settings, implementation="reference")
    run(optimizer, weights, 19)
    before = [optimizer.survivors(weight) for weight in prunable(weights)]
    pruned = [(weight == 0) for weight in prunable(weights)]
    run(optimizer, weights, 1, first=19)  # the update at step 20
    states = [optimizer.state_dict()["state"][i] for i in (0, 2, 3)]
    grown = [state["mask"].bool() & was for state, was in zip(states, pruned, strict=True)]
    alive = total(weights) - math.floor(optimizer.schedule.sparsity_at(20) * total(weights))
    wanted = math.floor(0.4 * 0.5 * (1 + math.cos(math.pi * 0.5)) * alive)
    assert sum(int(mask.sum()) for mask in grown) == wanted
    gradients = torch.cat([weight.grad.abs()[was] for weight, was in zip(prunable(weights), pruned, strict=True)])
    back = torch.cat([mask[was] for mask, was in zip(grown, pruned, strict=True)])
    assert gradients[back].min() >= gradients[~back].max()
    assert sum(optimizer.survivors(weight) for weight in prunable(weights)) == alive
    assert sum(before) > alive
    assert all((weight[mask] == 0).all() for weight, mask in zip(prunable(weights), grown, strict=True))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for weight, mask in zip(prunable(weights), grown, strict=True):
        moved = weight.detach()[mask].abs()
        assert (moved > 0).all()
        assert moved.max() <= 1e-2  # one learning rate, the size of a settled Adam step


def test_regrowth_resumes_bit_for_bit():
    options = {**PRUNING, "regrow": 0.3, "lr": 1e-2}
    straight = parameters()
    run(AdamWPrune(straight, **options), straight, 25)
    parts = parameters()
    first = AdamWPrune(parts, **options)
    run(first, parts, 12)
    second = AdamWPrune(parts, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(second, parts, 13, first=12)
    assert all(torch.equal(a, b) for a, b in zip(parts, straight, strict=True))


def test_stochastic_rounding_is_unbiased_and_repeats():
    values = torch.randn(200_000) * torch.logspace(-8, 8, 200_000)
    rounded = round_to_bfloat16(values, 7)
    assert torch.equal(rounded, round_to_bfloat16(values, 7))
    assert not torch.equal(rounded, round_to_bfloat16(values, 8))
    low = (values.view(torch.int32) & -65536).view(torch.float32)
    high = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((rounded.float() == low) | (rounded.float() == high)).all()
    third = torch.full((300_000,), 1.0 + 2**-9)  # between 1 and 1 + 2^-7: a quarter goes up
    assert float((round_to_bfloat16(third, 1) > 1).double().mean()) == pytest.approx(0.25, abs=0.005)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    assert torch.equal(round_to_bfloat16(special, 3)[:4].float(), special[:4])
    assert round_to_bfloat16(special, 3)[4].isnan()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_bfloat16_state(kind, options):
    weights, plain = parameters(), parameters()
    optimizer = kind(weights, **options, **PRUNING, state_dtype="bfloat16")
    run(optimizer, weights, 30)
    assert zeros(weights) == math.floor(0.8 * total(weights))
    for weight in weights:
        state = optimizer.state[weight]
        assert all(value.dtype == torch.bfloat16 for key, value in state.items() if key in kind.MOMENTS)
    again = kind(weights, **options, **PRUNING, state_dtype="bfloat16")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for weight in weights:
        for key, value in optimizer.state[weight].items():
            assert again.state[weight][key].dtype == value.dtype
            assert torch.equal(again.state[weight][key], value)
    run(kind(plain, **options), plain, 10)
    rounded = parameters()
    run(kind(rounded, **options, state_dtype="bfloat16"), rounded, 10)
    for a, b, start in zip(rounded, plain, parameters(), strict=True):
        assert (a - b).norm() < 0.05 * (b - start).norm()


def test_bytes_a_weight_in_bfloat16():
    weight = nn.Parameter(torch.randn(1024, 512))
    optimizer = AdamWPrune([weight], sparsity=0.7, end_step=2, frequency=1, state_dtype="bfloat16")
    run(optimizer, [weight], 3)
    kept = sum(value.untyped_storage().nbytes() for value in optimizer.state[weight].values())
    assert kept / weight.numel() <= 1.34


def test_sgdprune_loads_torchs_sgd():
    theirs, mine = parameters(), parameters()
    plain = torch.optim.SGD(theirs, lr=0.05, momentum=0.9, foreach=False)
    run(plain, theirs, 5)
    for a, b in zip(mine, theirs, strict=True):
        a.data.copy_(b)
    optimizer = SGDPrune(mine, lr=0.05, implementation="reference")
    optimizer.load_state_dict(plain.state_dict())
    run(optimizer, mine, 5, first=5)
    run(plain, theirs, 5, first=5)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_state_that_is_taken_away_or_changed_is_noticed(implementation):
    def fresh():
        weights = parameters()
        return weights, AdamWPrune(weights, lr=1e-2, implementation=implementation)

    weights, optimizer = fresh()
    run(optimizer, weights, 3)
    optimizer.state.clear()
    run(optimizer, weights, 1, first=3)
    assert all(int(optimizer.state[weight]["step"]) == 1 for weight in weights)
    assert len(optimizer.state_dict()["state"]) == len(weights)
    for weight in weights:
        optimizer.state[weight]["step"].zero_()
    run(optimizer, weights, 1, first=4)
    twins, other = fresh()
    run(other, twins, 3)
    other.state.clear()
    run(other, twins, 1, first=3)
    saved = copy.deepcopy(other.state_dict())
    for state in saved["state"].values():
        state["step"] = torch.tensor(0.0)
    other.load_state_dict(saved)
    run(other, twins, 1, first=4)
    assert all(torch.equal(a, b) for a, b in zip(weights, twins, strict=True))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_change_of_memory_layout_after_the_masks_is_refused(implementation):
    weights = parameters()
    optimizer = AdamWPrune(weights, lr=1e-2, **PRUNING, implementation=implementation)
    run(optimizer, weights, 6)
    saved = copy.deepcopy(optimizer.state_dict())
    weights[0].data = weights[0].data.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"had stride \(180, 9, 3, 1\) when its mask was made"):
        run(optimizer, weights, 1, first=6)
    optimizer.load_state_dict(saved)  # packs anew, in the new order
    before = zeros(weights)
    run(optimizer, weights, 1, first=6)
    assert zeros(weights) == before
