import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from toolkit.prune.hooks import pruned_by_hooks
from toolkit.prune.mask import unpack_bits
from toolkit.prune.schedule import Schedule


def train(optimizer, weight, gradients, after=lambda step: None):
    for step, grad in enumerate(gradients, 1):
        weight.grad = grad.clone()
        optimizer.step()
        after(step)


def pruned_optimizer(base, params, schedule, score, **options):
    """An optimizer of class `base` with hooks that prune."""
    kind = pruned_by_hooks(base, "magnitude" if score == "magnitude" else "movement")
    return kind(params, **options, **dataclasses.asdict(schedule), score=score)


def gradients(count, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def zeros(weight):
    return int((weight == 0).sum())


def test_movement_equals_a_float64_derivation_of_sanh_et_al():
    """S <- S - lr g w; keep the highest S; a pruned weight is 0, so its S rests and it starts again from 0."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(30, 20, dtype=torch.float64))
    w, scores, mask = weight.detach().clone(), torch.zeros(600, dtype=torch.float64), torch.ones(600, dtype=torch.bool)
    schedule = Schedule(0.6, 5, 40, 5)
    optimizer = pruned_optimizer(torch.optim.SGD, [weight], schedule, "movement", lr=0.1)
    revived = 0
    for step, grad in enumerate(gradients(45, (30, 20)), 1):
        grad = grad.double() + 0.5 * w.view(30, 20)  # pulls towards zero, so that scores fall below resting ones
        weight.grad = grad.clone()
        optimizer.step()
        scores -= 0.1 * (grad.view(-1) * w.view(-1))
        w = (w.view(-1) - 0.1 * grad.view(-1)).clone()
        if schedule.is_update_step(step) and (count := schedule.num_zeros_at(step, 600)):
            before = mask.clone()
            mask[:] = True
            mask[scores.float().argsort(stable=True)[:count]] = False
            revived += int((mask & ~before).sum())
        w *= mask
        torch.testing.assert_close(weight.detach().view(-1), w, rtol=1e-12, atol=1e-12)
    assert revived > 0  # the case the resting score is about did occur
    assert zeros(weight) == 360


def test_displacement_equals_its_formula_and_pruned_weights_stay_pruned():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, 25))
    initial = weight.detach().clone()
    optimizer = pruned_optimizer(torch.optim.SGD, [weight], Schedule(0.5, 0, 20, 20), "displacement", lr=0.05)
    before_last = None

    def note(step):
        nonlocal before_last
        if step == 19:
            before_last = weight.detach().clone()

    all_gradients = gradients(25, (40, 25))
    train(optimizer, weight, all_gradients, note)
    moved = before_last - 0.05 * all_gradients[19]
    score = (moved * (moved - initial)).view(-1)
    pruned = torch.zeros(1000, dtype=torch.bool)
    pruned[score.argsort(stable=True)[:500]] = True
    assert torch.equal((weight == 0).view(-1), pruned)


@pytest.mark.parametrize("score", ["magnitude", "movement", "displacement"])
def test_a_pruned_weight_never_outranks_a_survivor_for_a_negative_score(score):
    """The predecessor's cliff: pruned weights scored 0, above every survivor that had moved towards zero."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50, 40))
    schedule = Schedule(0.8, 0, 100, 5)
    optimizer = pruned_optimizer(torch.optim.SGD, [weight], schedule, score, lr=0.01)
    for step in range(1, 101):
        weight.grad = weight.detach().clone()  # pure decay: every survivor moves towards zero, every score is negative
        optimizer.step()
        if schedule.is_update_step(step):
            assert zeros(weight) == schedule.num_zeros_at(step, 2000)


@pytest.mark.parametrize("score", ["magnitude", "movement", "displacement"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_reload_then_step_equals_not_reloading(score, layout):
    def make():
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(16, 8, 3, 3).to(memory_format=layout))
        optimizer = pruned_optimizer(torch.optim.AdamW, [weight], Schedule(0.7, 2, 20, 3), score, lr=0.01)
        return weight, optimizer

    all_gradients = gradients(24, (16, 8, 3, 3))
    straight, straight_optimizer = make()
    train(straight_optimizer, straight, all_gradients)
    first, first_optimizer = make()
    train(first_optimizer, first, all_gradients[:11])
    second, second_optimizer = make()
    second.data.copy_(first.data)
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    for key, value in first_optimizer.state[first].items():
        loaded = second_optimizer.state[second][key]
        assert loaded.dtype == value.dtype
        assert loaded.nbytes == value.nbytes
        assert torch.equal(loaded, value)
    train(second_optimizer, second, all_gradients[11:])
    assert torch.equal(second, straight)
    assert zeros(straight) == int(0.7 * straight.numel())


def test_state_dict_mask_is_parameter_shaped():
    weight = nn.Parameter(torch.randn(6, 5))
    optimizer = pruned_optimizer(torch.optim.SGD, [weight], Schedule(0.5, 0, 2, 1), "magnitude", lr=0.1, momentum=0.9)
    train(optimizer, weight, gradients(3, (6, 5)))
    mask = optimizer.state_dict()["state"][0]["mask"]
    assert mask.dtype == torch.bool
    assert torch.equal(mask, weight != 0)
    assert torch.equal(unpack_bits(optimizer.state[weight]["mask"], 30).view(6, 5), mask)


@pytest.mark.parametrize(("score", "limit"), [("magnitude", 0.04), ("movement", 1.04), ("displacement", 1.04)])
def test_memory_beside_the_optimizers_own(score, limit):
    """In units of the weights' bytes; the study's movement pruner needs 3."""
    weight = nn.Parameter(torch.randn(256, 128))
    optimizer = pruned_optimizer(torch.optim.SGD, [weight], Schedule(0.7, 0, 3, 1), score, lr=0.1)
    train(optimizer, weight, gradients(4, (256, 128)))
    kept = sum(t.untyped_storage().nbytes() for t in optimizer.state[weight].values() if torch.is_tensor(t))
    assert kept <= limit * weight.nbytes


def test_survivor_at_zero_goes_first():
    """A weight that is exactly 0 counts as a zero; it must be among those asked for, not one more."""
    weight = nn.Parameter(torch.randn(10, 10))
    with torch.no_grad():
        weight[0] = 0.0
    optimizer = pruned_optimizer(torch.optim.SGD, [weight], Schedule(0.3, 0, 4, 1), "movement", lr=0.1)
    for grad in gradients(5, (10, 10)):
        grad[0] = 0.0  # dead inputs
        weight.grad = grad
        optimizer.step()
    assert zeros(weight) == 30


def test_sparsity_0_leaves_the_optimizer_alone():
    weight, twin = nn.Parameter(torch.randn(5, 4)), None
    twin = nn.Parameter(weight.detach().clone())
    optimizer, plain = pruned_optimizer(torch.optim.AdamW, [weight], Schedule(), "movement"), torch.optim.AdamW([twin])
    train(optimizer, weight, gradients(5, (5, 4)))
    train(plain, twin, gradients(5, (5, 4)))
    assert torch.equal(weight, twin)
    assert set(optimizer.state[weight]) == set(plain.state[twin])


def test_parameter_without_gradient_is_an_error_that_names_it():
    used, idle = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
    named = [("used", used), ("idle", idle)]
    optimizer = pruned_optimizer(torch.optim.SGD, named, Schedule(0.5, 0, 2, 1), "magnitude", lr=0.1)
    with pytest.raises(ValueError, match="idle is prunable but had no gradient"):
        train(optimizer, used, gradients(3, (4, 4)))


@pytest.mark.parametrize("score", ["magnitude", "movement", "displacement"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_is_pruned_like_the_original(score, how):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 8))
    optimizer = pruned_optimizer(torch.optim.AdamW, [weight], Schedule(0.7, 2, 20, 3), score, lr=0.01)
    every = gradients(24, (16, 8))
    train(optimizer, weight, every[:11])
    twin = how(optimizer)
    twin_weight = twin.param_groups[0]["params"][0]
    assert twin_weight is not weight
    train(twin, twin_weight, every[11:])
    assert zeros(twin_weight) == int(0.7 * 128)
    assert zeros(weight) < zeros(twin_weight)  # the copy prunes its own weight, not the original's
    train(optimizer, weight, every[11:])
    assert torch.equal(weight, twin_weight)
    twice = how(twin)
    train(twice, twice.param_groups[0]["params"][0], every[:2])
    assert zeros(twice.param_groups[0]["params"][0]) == int(0.7 * 128)


def test_kept_zeros_do_not_replace_the_masks_of_a_resumed_run():
    """A survivor may be exactly 0 when a run is saved; it is one after the load too."""
    torch.manual_seed(0)

    def make(weight):
        parameter = nn.Parameter(weight.clone())
        optimizer = pruned_optimizer(
            torch.optim.SGD,
            [{"params": [parameter], "prunable": True}],
            Schedule(0.5, 90, 99),
            "magnitude",
            lr=0.1,
            momentum=0.9,
        )
        optimizer.pruning.keep_zeros()
        return parameter, optimizer

    start = torch.randn(4, 8)
    start[0] = 0.0
    parameter, optimizer = make(start)
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert torch.equal(parameter == 0, start == 0)
    mask = optimizer.state[parameter]["mask"].clone()
    again, resumed = make(parameter.detach())
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        again[1, 0] = 0.0
    again.grad = torch.ones_like(again)
    resumed.step()
    assert torch.equal(resumed.state[again]["mask"], mask)
    assert again[1, 0] != 0
