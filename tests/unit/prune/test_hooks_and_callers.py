"""Hook-based pruning under the ways people call step: closures, maximize, scalers, other layouts, bfloat16."""

import pytest
import torch
from torch import nn

from toolkit.prune.hooks import pruned_by_hooks

SCORES = ["magnitude", "movement", "displacement"]


def make(score, weight, **options):
    kind = pruned_by_hooks(torch.optim.AdamW, "magnitude" if score == "magnitude" else "movement")
    return kind([weight], lr=1e-2, sparsity=0.6, end_step=10, frequency=2, score=score, **options)


def gradient(number, weight):
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)).to(weight.dtype)


def run(score, call, dtype=torch.float32, **options):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 12).to(dtype))
    optimizer = make(score, weight, **options)
    for number in range(14):
        call(optimizer, weight, number)
    assert int((weight == 0).sum()) == int(0.6 * 192)
    return weight.detach()


def plainly(optimizer, weight, number):
    weight.grad = gradient(number, weight)
    optimizer.step()


def with_closure(optimizer, weight, number):
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        weight.grad = gradient(number, weight)
        return torch.tensor(3.0)

    assert optimizer.step(closure) == 3.0
    assert calls == [True]
    weight.grad = None


@pytest.mark.parametrize("score", SCORES)
def test_a_closures_gradients_are_those_scored(score):
    assert torch.equal(run(score, plainly), run(score, with_closure))


@pytest.mark.parametrize("score", SCORES)
def test_maximizing_the_negative_is_the_same(score):
    def negated(optimizer, weight, number):
        weight.grad = -gradient(number, weight)
        optimizer.step()

    assert torch.equal(run(score, plainly), run(score, negated, maximize=True))


@pytest.mark.parametrize("score", SCORES)
def test_a_fused_step_under_a_scaler(score):
    """Fused optimizers are called with scaled gradients, and also where the scaler leaves a step out."""

    def scaled(optimizer, weight, number):
        if number == 4:
            weight.grad = torch.full_like(weight, torch.inf)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
            optimizer.step()
        weight.grad = gradient(number, weight) * 8
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    assert torch.equal(run(score, plainly, fused=True), run(score, scaled, fused=True))


@pytest.mark.parametrize("score", SCORES)
def test_another_memory_layout_once_masks_exist_is_an_error(score):
    weight = nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer = make(score, weight)
    for number in range(4):
        plainly(optimizer, weight, number)
    weight.data = weight.data.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"had stride .* when its mask was made"):
        plainly(optimizer, weight, 4)


def test_movement_sums_in_float32():
    weight = nn.Parameter(torch.randn(16, 12, dtype=torch.bfloat16))
    optimizer = make("movement", weight)
    plainly(optimizer, weight, 0)
    assert optimizer.state[weight]["scores"].dtype is torch.float32
    saved = optimizer.state_dict()
    again = make("movement", weight)
    again.load_state_dict(saved)
    assert torch.equal(again.state[weight]["scores"], optimizer.state[weight]["scores"])


def test_masks_of_version_0_1_load():
    """Their key was `keep`."""
    weight = nn.Parameter(torch.randn(8, 4))
    optimizer = make("magnitude", weight)
    for number in range(5):
        plainly(optimizer, weight, number)
    saved = optimizer.state_dict()
    old = {**saved["state"][0]}
    old["keep"] = old.pop("mask")
    again = make("magnitude", weight)
    again.load_state_dict({**saved, "state": {0: old}})
    assert torch.equal(again.state[weight]["mask"], optimizer.state[weight]["mask"])


def test_names_are_classes():
    kind = pruned_by_hooks(torch.optim.AdamW, "movement")
    assert issubclass(kind, torch.optim.AdamW)
    assert kind.__name__ == "AdamWMovement"
    assert pruned_by_hooks(torch.optim.AdamW, "movement") is kind
