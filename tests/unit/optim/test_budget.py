"""state_budget: what is kept stays within it at every step, through mask updates, checkpoints and loads."""

import copy
import pickle

import pytest
import torch
from coded import model, take_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import nn

import toolkit.optim  # noqa: F401
from toolkit.memory.activations import StorageTracker, rows_at_peak
from toolkit.memory.arithmetic import ParameterFacts, predict_optimizer_rows
from toolkit.optim import AdamWPrune, SGDPrune, param_groups
from toolkit.optim.registry import find_spec
from toolkit.prune.budget import KeptSizes, StateBudget

NAMES = ["adamwprune", "sgdprune", "adam-state", "adamwadv-state", "adamwspam-state"]
PRUNING = {"sparsity": 0.7, "begin_step": 3, "end_step": 19, "frequency": 2}
STEPS = 24
SIZES = (3 * 40 * 9, 40 * 33 * 9, 33 * 16 * 50)  # the first is below those that are coded


def build(name, net=None, **options):
    net = net or model()
    options = {"state_budget": "auto", **PRUNING, **options}
    return net, create_optimizer_v2(param_groups(net, 1e-2), name, lr=2e-3, **options)


def kept(optimizer):
    """What optimizer and pruning keep for prunable weights: (number of the parameter, key) -> tensor."""
    prunable = [p for group in optimizer.param_groups if group["prunable"] for p in group["params"]]
    states = ((number, key, value) for number, p in enumerate(prunable) for key, value in optimizer.state[p].items())
    return {(number, key): value for number, key, value in states if key != "step"}


def kept_bytes(optimizer):
    return sum(tensor.nbytes for tensor in kept(optimizer).values())


def highest(optimizer, net, work, given=()):
    """The most bytes that stand at any moment of `work`: what was kept before, and all that it makes.

    `given` are the caller's tensors.
    """
    tracker = StorageTracker()
    with tracker:
        known = [*net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None), *net.buffers()]
        tracker.forget(iter([*known, *given]))
        for tensor in kept(optimizer).values():
            tracker.stands(tensor)
        work()
    lives = [
        ("", one.born, tracker.events if one.died is None else one.died, one.size_bytes) for one in tracker.lifetimes
    ]
    return sum(rows_at_peak(lives, tracker.events, ())[0].values())


def limit_of(optimizer):
    sizes = KeptSizes(SIZES, len(optimizer.moment_keys(optimizer.param_groups[0])))
    return StateBudget("auto", sizes, int(0.7 * sum(SIZES))).limit_bytes


def run(name, steps=STEPS, **options):
    net, optimizer = build(name, **options)
    for number in range(1, steps + 1):
        take_gradients(net, number)
        optimizer.step()
    return net, optimizer


def one_layer(optimizer, net):
    """What may stand beyond the budget: the new state of the largest tensor, and its scores in float32."""
    state = optimizer.state[net[4].weight]
    return sum(tensor.nbytes for key, tensor in state.items() if key != "step") + 4 * max(SIZES)


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in NAMES), ("adamwprune", {"regrow": 0.2})], ids=str
)
def test_every_moment_of_a_run_with_checkpoints_and_resumes_is_within_the_budget(name, options, monkeypatch):
    """Beyond it one layer, and where native code makes the step nothing but at mask updates."""
    monkeypatch.setattr("toolkit.prune.stores.chunk_size", lambda device: 1024)  # layers are larger, as in real models
    net, optimizer = build(name, **options)
    limit = limit_of(optimizer)
    promised = {"sgdprune": 1.33, "adamwadv-state": 3.73}.get(name, 2.53)  # AdamWAdv has AMSGrad's third moment
    assert limit / sum(SIZES) == pytest.approx(promised, abs=0.01)
    has_native = "native" in optimizer.FAST
    dtypes = []
    for number in range(1, STEPS + 1):
        take_gradients(net, number)
        most = highest(optimizer, net, optimizer.step)
        steady = has_native and not optimizer.pruning.schedule.is_update_step(number)
        assert most <= limit + (8192 if steady else one_layer(optimizer, net)), number
        assert kept_bytes(optimizer) <= limit, number
        dtypes.append(optimizer.state[net[4].weight][optimizer.MOMENTS[0]].dtype)
        if number in (2, 6, 12, 21):  # dense, and in each precision of the ramp and after it
            saved = optimizer.state_dict()
            other, again = build(name, copy.deepcopy(net), **options)
            given = [tensor for state in saved["state"].values() for tensor in state.values()]
            most = highest(again, other, lambda again=again, saved=saved: again.load_state_dict(saved), given)
            assert most <= limit + one_layer(again, other)
            assert kept_bytes(again) == kept_bytes(optimizer)
            net, optimizer = other, again  # the run goes on with it
    assert list(dict.fromkeys(dtypes)) == [torch.uint8, torch.bfloat16, torch.float32]
    assert optimizer.pruning.sparsity() == (int(0.7 * sum(SIZES)), sum(SIZES))


@pytest.mark.parametrize("name", ["adamwprune", "sgdprune"])
@pytest.mark.parametrize("options", [{}, {"regrow": 0.2}, {"scope": "erk"}, {"sparsity": 0.9}, {"state_budget": 3.1}])
def test_resume_equals_not_stopping_in_every_precision(name, options):
    net, optimizer = build(name, **options)
    resumed = []
    for number in range(1, STEPS + 1):
        take_gradients(net, number)
        optimizer.step()
        if number in (2, 7, 11, 20):
            other, again = build(name, copy.deepcopy(net), **options)
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            resumed.append((number, other, again))
            resumed.append((number, *copy.deepcopy((net, optimizer))))
            resumed.append((number, *pickle.loads(pickle.dumps((net, optimizer)))))
    for number, other, again in resumed:
        for later in range(number + 1, STEPS + 1):
            take_gradients(other, later)
            again.step()
        assert all(map(torch.equal, net.parameters(), other.parameters())), number
        mine, theirs = kept(optimizer), kept(again)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), number


def test_at_the_end_it_is_float32_packed_state_and_in_the_ramp_bfloat16():
    """Widening is exact: what a budgeted run keeps is what its 8-bit past left, in more room."""
    net, optimizer = run("adamwprune", steps=19)
    weight = net[4].weight
    assert optimizer.state[weight]["exp_avg"].dtype is torch.float32
    assert "exp_avg_exponents" not in optimizer.state[weight]
    small = optimizer.state[net[0].weight]
    assert small["exp_avg"].dtype is torch.float32
    assert optimizer.state[net[0].bias]["exp_avg_sq"].dtype is torch.float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [2, 8, 13, STEPS])
def test_the_arithmetic_knows_every_byte(name, steps):
    net, optimizer = run(name, steps)
    facts, counted = [], {}
    for parameter in net.parameters():
        state = optimizer.state[parameter]
        facts.append(ParameterFacts(parameter.numel(), parameter.ndim > 1, optimizer.survivors(parameter)))
        for key, value in state.items():
            counted[f"optim.{key}"] = counted.get(f"optim.{key}", 0) + value.nbytes
    spec = find_spec(name)
    rows = predict_optimizer_rows(
        facts,
        spec.moments,
        counts_steps=spec.counts_steps,
        method="state" if "optim.mask" in counted else "none",
        score=None,
        state_dtype=optimizer.pruning._store.precision,
        budgeted=True,
    )
    for ours, theirs in (("optim.mask", "masks"), ("optim.offsets", "offsets")):
        assert counted.pop(ours, 0) == rows.pop(theirs, 0)
    steps = counted.pop("optim.step")  # sgdprune counts too, for its seeds; the plain SGD it is named after does not
    assert rows.pop("optim.step", steps) == steps
    assert rows == counted


def test_a_plain_optimizers_state_and_one_of_another_precision_are_taken():
    net, plain = model(), None
    plain = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    for number in range(1, 4):
        take_gradients(net, number)
        plain.step()
    state = plain.state_dict()
    optimizer = AdamWPrune(net.parameters(), lr=2e-3, state_budget="auto", **PRUNING)
    optimizer.load_state_dict(state)
    assert optimizer.state[net[4].weight]["exp_avg"].dtype is torch.uint8
    for number in range(4, STEPS + 1):
        take_gradients(net, number)
        optimizer.step()
    assert optimizer.state[net[4].weight]["exp_avg"].dtype is torch.float32


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 20_000), min_size=1, max_size=5),
    st.integers(1, 3),
    st.floats(0, 0.99),
    st.floats(0, 1),
    st.data(),
)
def test_what_fits_is_never_more_than_the_budget(numels, moments, sparsity, now, data):
    weights = sum(numels)
    budget = StateBudget("auto", KeptSizes(tuple(numels), moments), int(sparsity * weights))
    survivors = weights - int(now * sparsity * weights)
    dtype, left, facts = budget.widest(survivors), weights - survivors, []
    for numel in numels:  # zeros anywhere
        zeros = data.draw(st.integers(max(0, left - (weights - numel)), min(left, numel)))
        weights, left = weights - numel, left - zeros
        facts.append(ParameterFacts(numel, True, numel - zeros))
    names = [f"moment{number}" for number in range(moments)]
    rows = predict_optimizer_rows(
        facts, names, counts_steps=False, method="state", score=None, state_dtype=dtype, budgeted=True
    )
    assert sum(rows.values()) <= budget.limit_bytes
    if survivors == sum(numels) - int(sparsity * sum(numels)):
        assert dtype == "float32"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"state_budget": 2.0}, "smallest possible, 2.1[0-9]*: 8-bit moments"),
        ({"state_budget": 0}, "state_budget=0 must be bytes a prunable weight, for example 2.53, or auto"),
        ({"state_budget": "much"}, "state_budget='much' must be bytes"),
        ({"state_budget": float("nan")}, "state_budget=nan must be bytes"),
        ({"state_budget": "auto", "state_dtype": "int8"}, "give one of them"),
    ],
)
def test_errors_say_what_would_do(options, words):
    with pytest.raises(ValueError, match=words):
        AdamWPrune([nn.Parameter(torch.randn(128, 512))], **PRUNING, **options)


def test_the_smallest_possible_is_possible_and_sparsity_0_needs_no_masks():
    weights = [nn.Parameter(torch.randn(128, 512))]
    with pytest.raises(ValueError, match="smallest possible") as refused:
        AdamWPrune(weights, state_budget=1, **PRUNING)
    least = float(str(refused.value).split("smallest possible, ")[1].split(":")[0])
    AdamWPrune(weights, state_budget=least, **PRUNING)
    dense = SGDPrune(weights, lr=0.1, state_budget=1.01)
    weights[0].grad = torch.randn(128, 512)
    dense.step()
    assert dense.state[weights[0]]["momentum_buffer"].dtype is torch.uint8
