import math

import pytest
import torch
from torch import nn

from toolkit.optim.adamwspam import GRACE_STEPS, AdamWSPAM, spam_clip, spam_warmup_scale


def gradients(steps, shape=(12, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    made[37::50] *= 1000.0  # spikes
    return made


def spam_by_the_paper(start, all_gradients, *, lr, betas, eps, decay, theta, interval, warmup):
    """SPAM (arXiv 2501.06842) in plain float64, one weight array, steps counted from 1."""
    w, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    since = None
    for t, g in enumerate(all_gradients, 1):
        if interval and t % interval == 0:
            m, v, since = torch.zeros_like(m), torch.zeros_like(v), 0
        elif since is not None:
            since += 1
        if theta and t >= GRACE_STEPS and (not interval or t % interval >= GRACE_STEPS):
            spike = g**2 > theta * v
            g = torch.where(spike, g.sign() * (theta * v).sqrt(), g)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        scale = 1.0
        if since is not None and since <= warmup:
            scale = 1 - 0.99 * (1 + math.cos(math.pi * since / (warmup + 1))) / 2
        w = w - scale * lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (v.sqrt() + eps)
        w = w * (1 - lr * decay)
    return w


DEFAULTS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6}
SETTINGS = {"spike_threshold": 30.0, "reset_interval": 60, "warmup_steps": 25, "weight_decay": 0.1}


def train(steps, **options):
    start = torch.randn(12, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = AdamWSPAM([weight], **(DEFAULTS | SETTINGS | options))
    for grad in gradients(steps):
        weight.grad = grad.clone()
        optimizer.step()
    return start, weight.detach()


def test_equals_the_paper_in_float64():
    start, weight = train(200)
    wanted = spam_by_the_paper(start, gradients(200), **DEFAULTS, decay=0.1, theta=30.0, interval=60, warmup=25)
    torch.testing.assert_close(weight, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("off", [{"spike_threshold": 0.0}, {"reset_interval": 0}, {"warmup_steps": 0}])
def test_each_part_matters(off):
    start, without = train(200, **off)
    wanted = spam_by_the_paper(start, gradients(200), **DEFAULTS, decay=0.1, theta=30.0, interval=60, warmup=25)
    assert (without - wanted).abs().max() > 1e-6


def test_all_off_is_adam_with_decoupled_decay():
    start, weight = train(50, spike_threshold=0.0, reset_interval=0, weight_decay=0.0)
    twin = nn.Parameter(start.clone())
    adam = torch.optim.Adam([twin], lr=1e-3, eps=1e-30)
    small_eps = AdamWSPAM([nn.Parameter(start.clone())], lr=1e-3, eps=1e-30, spike_threshold=0.0, reset_interval=0)
    mine = small_eps.param_groups[0]["params"][0]
    for grad in gradients(50):
        twin.grad, mine.grad = grad.clone(), grad.clone()
        adam.step()
        small_eps.step()
    torch.testing.assert_close(mine, twin, rtol=1e-12, atol=1e-12)
    assert (weight - start).abs().max() > 0


def test_clip_keeps_signs_and_small_gradients():
    grad, second = torch.tensor([10.0, -10.0, 1.0, -1.0]), torch.full((4,), 1.0)
    assert spam_clip(grad, second, 4.0).tolist() == [2.0, -2.0, 1.0, -1.0]


def test_warmup_runs_from_one_hundredth_to_one():
    assert spam_warmup_scale(0, 150) == pytest.approx(0.01)
    assert spam_warmup_scale(151, 150) == 1.0
    rising = [spam_warmup_scale(k, 150) for k in range(160)]
    assert rising == sorted(rising)


def prune_steps(optimizer, weight, steps):
    """Steps after which the number of zeros had grown."""
    found, before = [], 0
    for step, grad in enumerate(gradients(steps, weight.shape), 1):
        weight.grad = grad.clone()
        optimizer.step()
        now = int((weight == 0).sum())
        if now > before:
            found.append(step)
        before = now
    return found


def test_mask_updates_wait_for_the_warm_up():
    weight = nn.Parameter(torch.randn(200, 70, dtype=torch.float64))
    options = SETTINGS | {"sparsity": 0.7, "begin_step": 40, "end_step": 115, "frequency": 5}
    optimizer = AdamWSPAM([weight], **(DEFAULTS | options))
    steps = prune_steps(optimizer, weight, 130)
    assert not [step for step in steps if 60 <= step <= 60 + 25]
    assert 86 in steps  # the updates due within the warm-up, made once, right after it
    assert steps[-1] == 115
    assert int((weight == 0).sum()) == int(0.7 * 14000)


def test_a_reset_over_the_last_update_is_left_out(caplog):
    weight = nn.Parameter(torch.randn(200, 70, dtype=torch.float64))
    options = SETTINGS | {"sparsity": 0.7, "begin_step": 10, "end_step": 130, "frequency": 5}
    with caplog.at_level("INFO", logger="toolkit"):
        optimizer = AdamWSPAM([weight], **(DEFAULTS | options))
    assert "step 120 is left out" in caplog.text
    assert prune_steps(optimizer, weight, 140)[-1] == 130
    assert int((weight == 0).sum()) == int(0.7 * 14000)


def test_packed_equals_masked_dense_spam():
    """After pruning, survivors move as they would in dense SPAM with the same gradients."""
    start = torch.randn(12, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    packed, dense = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = DEFAULTS | SETTINGS
    one = AdamWSPAM([packed], **options, sparsity=0.5, begin_step=0, end_step=10, frequency=10)
    two = AdamWSPAM([dense], **options)
    for grad in gradients(150):
        packed.grad, dense.grad = grad.clone(), grad.clone()
        one.step()
        two.step()
    alive = packed != 0
    assert int(alive.sum()) == 42
    assert torch.equal(packed[alive], dense[alive])


@pytest.mark.parametrize(
    ("options", "words"), [({"spike_threshold": -1.0}, "spike_threshold"), ({"warmup_steps": 60}, "must be below")]
)
def test_refuses_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        AdamWSPAM([nn.Parameter(torch.zeros(2, 2))], **(SETTINGS | options))
