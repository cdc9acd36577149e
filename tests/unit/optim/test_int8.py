"""state_dtype=int8 in the optimizers: implementations alike, resume to the bit, bytes as promised, nothing thrown."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from coded import model, take_gradients
from timm.optim import create_optimizer_v2
from torch import nn

import toolkit.optim  # noqa: F401
from toolkit.kernels.compiled import available
from toolkit.memory.arithmetic import ParameterFacts, predict_optimizer_rows
from toolkit.optim import AdamWPrune, SGDPrune, param_groups
from toolkit.optim.registry import find_spec, specs

NAMES = [spec.name for spec in specs() if spec.method == "state"]
PRUNING = {"sparsity": 0.7, "begin_step": 3, "end_step": 11, "frequency": 4}
STEPS = 16


def build(name, net=None, **options):
    net = net or model()
    optimizer = create_optimizer_v2(
        param_groups(net, 1e-2), name, lr=2e-3, **{"state_dtype": "int8", **PRUNING, **options}
    )
    return net, optimizer


def step(net, optimizer, number):
    take_gradients(net, number)
    optimizer.step()


def states(optimizer):
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def assert_equal_states(one, other):
    for mine, theirs in zip(states(one), states(other), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize(
    ("name", "regrow"),
    [(name, 0.0) for name in NAMES]
    + [pytest.param(name, 0.2, marks=() if name == "adamwprune" else pytest.mark.long) for name in NAMES],
)
def test_a_load_gives_the_same_codes_at_every_step_and_resume_equals_not_stopping(name, regrow):
    net, optimizer = build(name, regrow=regrow)
    resumed = []
    for number in range(1, STEPS + 1):
        step(net, optimizer, number)
        again, loaded = build(name, copy.deepcopy(net), regrow=regrow)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert_equal_states(optimizer, loaded)
        if number in (2, 7, 13):  # dense, while masks change, after them
            resumed.append((number, again, loaded))
    assert optimizer.pruning.sparsity() == (int(0.7 * 39_360), 39_360)
    for number, again, loaded in resumed:
        for later in range(number + 1, STEPS + 1):
            step(again, loaded, later)
        assert all(map(torch.equal, net.parameters(), again.parameters()))
        assert_equal_states(optimizer, loaded)


@pytest.mark.skipif(not available(), reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["adamwprune", "sgdprune"])
def test_native_code_trains_as_the_reference(kind):
    (net, optimizer), (other, reference) = build(kind), build(kind, implementation="reference")
    for number in range(1, STEPS + 1):
        step(net, optimizer, number)
        with mock.patch("toolkit.kernels.native.fits", return_value=False):
            step(other, reference, number)
    ours, theirs = (torch.cat([p.detach().flatten() for p in one.parameters()]) for one in (net, other))
    assert ((ours == 0) == (theirs == 0)).float().mean() > 0.999
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(
    ("name", "sparsity", "most"),
    [
        ("adamwprune", 0.0, 2.05),
        ("adamwprune", 0.7, 0.77),
        ("adamwprune", 0.9, 0.37),
        ("sgdprune", 0.0, 1.03),
        ("sgdprune", 0.7, 0.45),
    ],
)
def test_bytes_a_weight(name, sparsity, most):
    """Of the large prunable tensors, everything kept for them; small ones and biases stay float32."""
    net, optimizer = build(name, sparsity=sparsity)
    for number in range(1, STEPS + 1):
        step(net, optimizer, number)
    large = [p for p in net.parameters() if p.numel() >= 4096]
    kept = sum(v.nbytes for p in large for key, v in optimizer.state[p].items() if key != "step")
    left = sum(int((p != 0).sum()) for p in large) / sum(p.numel() for p in large)
    assert kept / sum(p.numel() for p in large) <= most + (left - (1 - sparsity)) * 2  # scope is global
    for p in net.parameters():
        moment = optimizer.state[p]["momentum_buffer" if name == "sgdprune" else "exp_avg"]
        assert moment.dtype is (torch.uint8 if p.numel() >= 4096 else torch.float32)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", ["adamwprune", "sgdprune"])
def test_the_arithmetic_knows_every_byte(name, state_dtype):
    net, optimizer = build(name, state_dtype=state_dtype)
    for number in range(1, STEPS + 1):
        step(net, optimizer, number)
    facts, kept = [], {}
    for parameter in net.parameters():
        state = optimizer.state[parameter]
        facts.append(ParameterFacts(parameter.numel(), parameter.ndim > 1, optimizer.survivors(parameter)))
        for key, value in state.items():
            kept[key] = kept.get(key, 0) + value.nbytes
    spec = find_spec(name)
    rows = predict_optimizer_rows(
        facts, spec.moments, counts_steps=spec.counts_steps, method="state", score=None, state_dtype=state_dtype
    )
    named = {row.removeprefix("optim."): size for row, size in rows.items()}
    assert named.pop("masks") == kept.pop("mask")
    counted = kept.pop("step")
    assert named.pop("step", counted) == counted
    assert named == kept


def test_gradients_that_are_zero_for_long_and_then_not_throw_nothing():
    """A survivor whose squared moment had become 0 beside a first moment that had not would leap."""
    weight = nn.Parameter(torch.randn(64, 128))
    optimizer = AdamWPrune([weight], lr=1e-3, weight_decay=0.0, state_dtype="int8")
    generator = torch.Generator().manual_seed(0)
    farthest = 0.0
    for number in range(1200):
        quiet = 100 <= number < 600
        scale = torch.exp(torch.randn(64, 128, generator=generator) * 3)
        weight.grad = torch.zeros_like(weight) if quiet else torch.randn(64, 128, generator=generator) * scale * 1e-3
        before = weight.detach().clone()
        optimizer.step()
        farthest = max(farthest, float((weight.detach() - before).abs().max()))
    assert farthest < 0.012  # Adam's own bound is lr (1 - beta1) / sqrt(1 - beta2), 0.0032
    assert weight.isfinite().all()


def test_adamws_state_is_coded_when_loaded_and_the_dense_form_is_adamws():
    net, optimizer = build("adamwprune", sparsity=0.0)
    plain = torch.optim.AdamW(param_groups(net, 1e-2), lr=2e-3)
    for number in range(1, 5):
        step(net, plain, number)
    optimizer.load_state_dict(plain.state_dict())
    assert {state["exp_avg"].dtype for state in states(optimizer)} == {torch.uint8, torch.float32}
    for mine, theirs in zip(
        optimizer.state_dict()["state"].values(), plain.state_dict()["state"].values(), strict=True
    ):
        assert mine.keys() == theirs.keys()
        for key in ("exp_avg", "exp_avg_sq"):
            assert mine[key].dtype is torch.float32
            assert (mine[key] - theirs[key]).norm() < 0.05 * theirs[key].norm()
    plain.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", [AdamWPrune, SGDPrune])
def test_copies_and_pickles_train_alike(kind):
    weight = nn.Parameter(torch.randn(64, 80))
    optimizer = kind([weight], lr=1e-2, state_dtype="int8", sparsity=0.5, end_step=4, frequency=1)
    for number in range(6):
        weight.grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(number))
        optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (twin,) = other.param_groups[0]["params"]
        twin.grad = weight.grad = torch.ones(64, 80)
        assert_equal_states(optimizer, other)


def test_refused_where_moments_are_torchs_own():
    with pytest.raises(TypeError, match="state_dtype"):
        create_optimizer_v2([nn.Parameter(torch.ones(2, 2))], "adamw-magnitude", sparsity=0, state_dtype="int8")
