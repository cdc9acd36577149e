"""8-bit moments in Triton's interpreter: the same codes as the reference's, of the same moments; and whole runs."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import block_offsets
from torch import Tensor, nn

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is here: tests/gpu runs the kernels on it", allow_module_level=True)

from toolkit.kernels import triton_packed
from toolkit.kernels.choice import choose_implementation
from toolkit.kernels.narrow import GROUP, narrow, num_groups, places_of, widen
from toolkit.kernels.native import PackedTensor
from toolkit.kernels.reference import adam_update, sgd_update
from toolkit.optim import AdamWPrune, AdamWSPAM, SGDPrune
from toolkit.prune.mask import pack_bits
from toolkit.prune.packing import pack

CPU = torch.device("cpu")
SIGNS = {"adam": (True, False), "amsgrad": (True, False, False), "sgd": (True,)}
SIZES = (1, 300, 1024, 1025, 2 * 1024 + 3 * 256 + 40)
UNTOUCHED = torch.full((1024,), 77, dtype=torch.uint8)  # what lies behind codes and exponents
STEP, FIRST = 3, 5 * GROUP  # of a shard that begins with the sixth group


class Case:
    """A tensor, its moments as codes, and the same moments as floats."""

    def __init__(self, rule: str, numel: int, sparsity: float | None, generator: torch.Generator, coarse: bool):
        def drawn(count: int) -> Tensor:
            """Of a few bits: sums and products with quarters are exact, in whatever order."""
            values = torch.randint(-64, 65, (count,), generator=generator) / 64.0
            return values if coarse else torch.randn(count, generator=generator) * 0.01

        self.signs = SIGNS[rule]
        self.keep = None if sparsity is None else torch.rand(numel, generator=generator) >= sparsity
        self.places = places_of(self.keep, numel, FIRST, device=CPU)
        self.weight, self.grad, self.groups = torch.randn(numel, generator=generator), drawn(numel), num_groups(numel)
        mask = None if self.keep is None else pack_bits(self.keep)
        offsets = None if mask is None else block_offsets(mask, numel)[0]
        start = [drawn(len(self.places)) if signed else drawn(len(self.places)).square() for signed in self.signs]
        kept = [self.narrow(value, number) for number, value in enumerate(start)]
        self.moments = [self.widen(number, *pair) for number, pair in enumerate(kept)]
        self.buffers = [torch.cat((values, UNTOUCHED)) for pair in kept for values in pair]
        places = [buffer[: -len(UNTOUCHED)] for buffer in self.buffers]
        self.codes, self.exponents = places[::2], places[1::2]
        own = (self.weight, self.grad)
        self.kept = own if mask is None else tuple(pack(value, mask, len(self.places)) for value in own)
        self.kept = tuple(value.clone() for value in self.kept)
        self.row = PackedTensor(self.weight, self.grad, mask, offsets, self.codes, self.exponents, first=FIRST)

    def narrow(self, values: Tensor, number: int, seed: int | None = None) -> tuple[Tensor, Tensor]:
        return narrow(values, self.places, self.groups, signed=self.signs[number], seed=seed, first=FIRST)

    def widen(self, number: int, codes: Tensor, exponents: Tensor) -> Tensor:
        return widen(codes, exponents, self.places, signed=self.signs[number], first=FIRST)


def update(rule: str, cases: list[Case], beta1: float, beta2: float, stochastic: bool = True) -> None:
    """One step of all cases by the kernel, and of their floats by the reference; parameters count from 1."""
    hyper: dict[str, float] = {"lr": 0.1, "weight_decay": 0.01, "decoupled": True}
    if rule == "sgd":
        hyper.update(momentum=beta1, dampening=1 - beta1, nesterov=False)
    else:
        hyper.update(beta1=beta1, beta2=beta2, eps=1e-8)
    rows = [case.row for case in cases]
    table = triton_packed.AddressTable().update(rows, range(1, len(rows) + 1))
    kernel = triton_packed.KERNELS["sgd" if rule == "sgd" else "adam"]
    kernel(rows, table, torch.tensor([float(STEP)]), stochastic=stochastic, **hyper)
    for case in cases:
        assert all(torch.equal(buffer[-len(UNTOUCHED) :], UNTOUCHED) for buffer in case.buffers)
        weight, grad = case.kept
        if rule == "sgd":
            sgd_update(weight, grad, case.moments[0], first=False, **hyper)
        else:
            more = case.moments[2] if rule == "amsgrad" else None
            adam_update(weight, grad, *case.moments[:2], more, step=STEP, **hyper)


def seed_of(index: int, number: int) -> int:
    return (STEP * 65_537 + index) * 3 + number


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(SIGNS)),
    st.integers(1, 2600),
    st.one_of(st.none(), st.floats(0, 1)),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_of_the_same_moments_codes_and_exponents_are_the_references(
    rule: str, numel: int, sparsity: float | None, seed: int, stochastic: bool
) -> None:
    """By an update whose float32 results are exact, so that no last bit of a moment can differ."""
    case = Case(rule, numel, sparsity, torch.Generator().manual_seed(seed), coarse=True)
    update(rule, [case], 0.75, 0.75, stochastic)
    for number, value in enumerate(case.moments):
        codes, exponents = case.narrow(value, number, seed_of(1, number) if stochastic else None)
        assert torch.equal(case.codes[number], codes)
        assert torch.equal(case.exponents[number], exponents)


@pytest.mark.parametrize("sparsity", [None, 0.0, 0.7, 0.97, 1.0])
@pytest.mark.parametrize("rule", list(SIGNS))
def test_a_step_is_the_references(rule: str, sparsity: float | None) -> None:
    """Of usual numbers. Multiply-adds may round a moment's last bit otherwise, and that tips a code over where the
    value lies beside the border between two: one step, in fewer than one place of a thousand."""
    generator = torch.Generator().manual_seed(7)
    cases = [Case(rule, numel, sparsity, generator, coarse=False) for numel in SIZES]
    update(rule, cases, 0.9, 0.999)
    differing = sum(check_step(case, index) for index, case in enumerate(cases, start=1))
    assert differing <= 1e-3 * sum(len(case.places) * len(case.signs) for case in cases)


def check_step(case: Case, index: int) -> int:
    """How many codes differ from the reference's; weights are equal but for rounding, and none else differs."""
    after = case.weight if case.keep is None else case.weight[case.keep]
    torch.testing.assert_close(after, case.kept[0], rtol=1e-5, atol=1e-6)
    assert case.keep is None or not case.weight[~case.keep].any()
    differing = 0
    for number, value in enumerate(case.moments):
        codes, exponents = case.narrow(value, number, seed_of(index, number))
        assert torch.equal(case.exponents[number], exponents)
        apart = case.codes[number].int() - codes.int()
        assert not len(apart) or apart.abs().max() <= 1
        differing += int((apart != 0).sum())
    return differing


def test_a_squared_moment_above_0_stays_above_0() -> None:
    """Far below its group's largest: a denominator of eps alone would throw the weight out."""
    case = Case("adam", GROUP, None, torch.Generator().manual_seed(0), coarse=True)
    for values in (*case.codes, *case.moments):
        values.zero_()
    case.grad.copy_(torch.tensor([1.0, 2.0**-24, 0.0, -(2.0**-30)]).repeat(GROUP // 4))
    case.kept[1].copy_(case.grad)
    update("adam", [case], 0.75, 0.75)
    assert torch.equal(case.codes[1], case.narrow(case.moments[1], 1, seed_of(1, 1))[0])
    assert torch.equal(case.codes[1] > 0, case.grad != 0)


def test_values_that_are_not_finite_stay_loud() -> None:
    numel = 2 * GROUP + 10
    grad = torch.ones(numel)
    grad[[3, GROUP, GROUP + 1]] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    codes, exponents = torch.zeros(numel, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)
    row = PackedTensor(torch.ones(numel), grad, None, None, [codes], [exponents])
    table = triton_packed.AddressTable().update([row], [1])
    rule = {"momentum": 0.5, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "decoupled": False}
    triton_packed.packed_sgd([row], table, torch.tensor([1.0]), lr=0.5, **rule)
    places = places_of(None, numel, device=CPU)
    wanted = narrow(grad, places, 3, signed=True)  # at step 1 the buffer is the gradient
    assert torch.equal(codes, wanted[0])
    assert torch.equal(exponents, wanted[1])
    wide = widen(codes, exponents, places, signed=True)
    assert torch.equal(wide.isfinite(), grad.isfinite())
    assert torch.equal(wide.isnan(), grad.isnan())


def test_a_gpu_takes_the_kernels_for_codes_without_being_asked():
    parameter = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 0))
    assert choose_implementation("auto", parameter, torch.uint8, AdamWPrune.FAST) == "triton"


SHAPES = ((64, 67), (7,))  # 4,288 weights: coded, and no multiple of 256
RAMP = {"sparsity": 0.8, "begin_step": 1, "end_step": 4}


def train(kind, implementation, steps=6, dtype=torch.float32, **options):
    """(weights, dtype of the first one's moments at each step, the optimizer) of a short run."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = kind(weights, implementation=implementation, frequency=1, **RAMP, **options)
    seen = []
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
        optimizer.step()
        seen.append(optimizer.state[weights[0]][optimizer.MOMENTS[0]].dtype)
    return weights, seen, optimizer


def check_weights(mine, wanted, tolerance):
    """Masks may differ in a place of a thousand, where a code has tipped over beside the threshold."""
    for one, other in zip(mine, wanted, strict=True):
        same = (one == 0) == (other == 0)
        assert same.float().mean() >= 0.999
        assert (one - other)[same].float().norm() <= tolerance * other.float().norm()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # SPAM without clipping: infinity times 0
@pytest.mark.parametrize(
    ("kind", "dtype", "options"),
    [
        (AdamWPrune, torch.float32, {}),
        (AdamWPrune, torch.bfloat16, {}),
        (AdamWPrune, torch.float32, {"amsgrad": True, "decoupled_weight_decay": False, "weight_decay": 0.1}),
        (SGDPrune, torch.float32, {"nesterov": True, "maximize": True}),
        (AdamWSPAM, torch.float32, {"reset_interval": 3, "warmup_steps": 1}),
    ],
)
def test_a_run_trains_as_the_references(kind, dtype, options, monkeypatch):
    used = []
    original = kind.update_by_kernel
    monkeypatch.setattr(
        kind,
        "update_by_kernel",
        lambda self, bucket, group: (used.append((bucket.how, bucket.packed)), original(self, bucket, group))[1],
    )
    options = {"lr": 1e-2, "state_dtype": "int8", "dtype": dtype, **options}
    wanted, *_ = train(kind, "reference", **options)
    assert not used
    mine, seen, _ = train(kind, "triton", **options)
    assert {("triton", False), ("triton", True)} <= set(used)
    assert set(seen) == {torch.uint8}
    check_weights(mine, wanted, 2e-2 if dtype is torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("kind", [AdamWPrune, SGDPrune])
def test_a_budget_goes_from_codes_to_floats_within_a_run(kind):
    (mine, seen, optimizer), (wanted, also_seen, _) = (
        train(kind, implementation, lr=1e-2, state_budget="auto") for implementation in ("triton", "reference")
    )
    assert list(dict.fromkeys(seen)) == [torch.uint8, torch.bfloat16, torch.float32]
    assert seen == also_seen
    check_weights(mine, wanted, 1e-3)
    assert optimizer.pruning.sparsity() == (int(0.8 * 4288), 4288)


def test_a_resume_goes_on_with_the_same_codes():
    weights, _, optimizer = train(AdamWPrune, "triton", lr=1e-2, state_dtype="int8")
    copies = [nn.Parameter(weight.detach().clone()) for weight in weights]
    resumed = AdamWPrune(copies, implementation="triton", state_dtype="int8", frequency=1, **RAMP)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for weight, other in zip(weights, copies, strict=True):
        weight.grad = torch.randn(weight.shape)
        other.grad = weight.grad.clone()
    optimizer.step()
    resumed.step()
    for weight, other in zip(weights, copies, strict=True):
        assert torch.equal(weight, other)
        for key, value in optimizer.state[weight].items():
            assert torch.equal(value, resumed.state[other][key])
