"""Whatever gradients are missing, every parameter's counter is its own, as in torch's optimizers."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.sgdprune import SGDPrune
from toolkit.prune.hooks import pruned_by_hooks

SHAPES = ((5, 4), (4,), (3, 5), (3,))
PATTERNS = st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=2, max_size=14)


def make():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def step(optimizer, weights, number, present):
    generator = torch.Generator().manual_seed(number)
    for weight, there in zip(weights, present, strict=True):
        grad = torch.randn(weight.shape, generator=generator)
        weight.grad = grad if there else None
    optimizer.step()


PAIRS = {
    "adamw": (AdamWPrune, torch.optim.AdamW, {"lr": 1e-2}, {}),
    "sgd": (SGDPrune, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}, {"momentum": 0.9}),
}


@pytest.mark.parametrize("implementation", ["reference", "auto"])
@pytest.mark.parametrize("pair", PAIRS)
@given(pattern=PATTERNS, reload_at=st.integers(0, 13))
@settings(max_examples=25, deadline=None)
def test_any_pattern_of_missing_gradients_equals_torch(pair, implementation, pattern, reload_at):
    ours, theirs, options, more = PAIRS[pair]
    mine, wanted = make(), make()
    optimizer = ours(mine, implementation=implementation, **options)
    plain = theirs(wanted, foreach=False, **options, **more)
    for number, present in enumerate(pattern):
        if number == reload_at:
            saved, optimizer = (
                copy.deepcopy(optimizer.state_dict()),
                ours(mine, implementation=implementation, **options),
            )
            optimizer.load_state_dict(saved)
        step(optimizer, mine, number, present)
        step(plain, wanted, number, present)
    for a, b in zip(mine, wanted, strict=True):
        if implementation == "reference":
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        if pair == "adamw" and b in plain.state:
            assert int(optimizer.state[a]["step"]) == int(plain.state[b]["step"])


KINDS = [AdamWPrune, SGDPrune, pruned_by_hooks(torch.optim.AdamW, "magnitude")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_schedule_runs_on_optimizer_steps(kind):
    """Experts that take turns: none has a gradient at every step, and yet end_step comes when it should."""
    weights = [nn.Parameter(torch.randn(10, 8)) for _ in range(3)]
    optimizer = kind(weights, lr=1e-2, sparsity=0.5, end_step=20, frequency=5)
    for number in range(20):
        step(optimizer, weights, number, [number % 3 == turn for turn in range(3)])
    assert optimizer.pruning.sparsity() == (120, 240)


@pytest.mark.parametrize("kind", [AdamWPrune, pruned_by_hooks(torch.optim.AdamW, "magnitude")])
@pytest.mark.parametrize(("past", "sparsity"), [(torch.optim.AdamW, None), ("same", 0.4), ("same", 0.9)])
def test_a_state_past_the_end_of_another_schedule_is_an_error(kind, past, sparsity):
    weights = [nn.Parameter(torch.randn(10, 8))]
    schedule = {"end_step": 6, "frequency": 2}
    first = past(weights) if past is torch.optim.AdamW else kind(weights, sparsity=sparsity, **schedule)
    for number in range(8):
        step(first, weights, number, [True])
    second = kind(weights, sparsity=0.6, **schedule)
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match=r"step 9 is past end_step=6, the last mask update, but \d+ of 80 weights"):
        step(second, weights, 9, [True])


@pytest.mark.parametrize("kind", [AdamWPrune, pruned_by_hooks(torch.optim.AdamW, "movement")])
def test_plain_state_and_new_groups_prune_on(kind):
    weights = [nn.Parameter(torch.randn(10, 8)) for _ in range(2)]
    plain = torch.optim.AdamW(weights[:1])
    for number in range(5):
        step(plain, weights[:1], number, [True])
    optimizer = kind(weights[:1], sparsity=0.5, end_step=10, frequency=1)
    optimizer.load_state_dict(plain.state_dict())
    optimizer.add_param_group({"params": weights[1:]})
    for number in range(5):
        step(optimizer, weights, number, [True, True])
    assert optimizer.pruning.sparsity() == (80, 160)
