"""Weights in bfloat16 whose updates are rounded by chance: the mean is exact, implementations alike, zeros stay."""

import copy
import os

import pytest
import torch
from packed import block_offsets
from torch import Tensor, nn

from toolkit.kernels import native
from toolkit.kernels.compiled import available
from toolkit.kernels.narrow import num_groups
from toolkit.kernels.rounding import moment_seed, round_to_bfloat16, weight_seed
from toolkit.optim import AdamWPrune, AdamWSPAM, SGDPrune
from toolkit.prune.mask import pack_bits

needs_native = pytest.mark.skipif(not available(), reason="no C++ compiler, so no native code")
IMPLEMENTATIONS = ["reference", pytest.param("native", marks=needs_native)]
# What SGD computes from these without rounding: at step 1 the buffer is the gradient.
EXACT = {"lr": 0.5, "momentum": 0.5, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "decoupled": False}
STEP, INDEX, FIRST = 1, 3, 777  # of a shard that begins within a group
SIZES = (17, 1024, 1024 + 300)


def case(numel: int, sparsity: float | None, state_dtype: torch.dtype) -> tuple[native.PackedTensor, Tensor]:
    """A tensor before its first update, and its weights after it."""
    generator = torch.Generator().manual_seed(numel)
    weight, grad = (torch.randn(numel, generator=generator).bfloat16() for _ in range(2))
    weight[::5] = 0
    grad[::5] = 0
    keep = torch.ones(numel, dtype=torch.bool)
    mask = offsets = None
    if sparsity is not None:
        keep = torch.rand(numel, generator=generator) >= sparsity
        mask = pack_bits(keep)
        offsets, _ = block_offsets(mask, numel)
    after = torch.where(keep, weight.float() - 0.5 * grad.float(), 0.0)
    seed = moment_seed(STEP, INDEX)
    exponents = [torch.zeros(num_groups(numel), dtype=torch.uint8)] if state_dtype is torch.uint8 else ()
    buffer = torch.zeros(int(keep.sum()), dtype=state_dtype)
    row = native.PackedTensor(weight, grad, mask, offsets, [buffer], exponents, seed, FIRST)
    return row, round_to_bfloat16(after, weight_seed(seed), FIRST)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("isa", [pytest.param(isa, marks=needs_native) for isa in native.ISAS] + ["triton"])
def test_they_are_rounded_to_the_bits_of_the_reference(isa, sparsity, state_dtype):
    cases = [case(numel, sparsity, state_dtype) for numel in SIZES]
    rows = [row for row, _ in cases]
    if isa == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("a GPU is here: tests/gpu runs the kernels on it")
        from toolkit.kernels import triton_packed

        table = triton_packed.AddressTable().update(rows, [INDEX] * len(rows))
        triton_packed.packed_sgd(rows, table, torch.tensor([float(STEP)]), stochastic_weights=True, **EXACT)
    elif native.ISAS.index(isa) > native.ISAS.index(native.best_isa()):
        pytest.skip(f"this processor has no {isa}")
    else:
        native.packed_sgd(rows, step=STEP, stochastic_weights=True, isa=isa, **EXACT)
    for row, wanted in cases:
        assert torch.equal(row.weight.view(torch.int16), wanted.view(torch.int16))
        assert not row.weight[::5].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_the_mean_of_many_roundings_is_the_exact_update(implementation, state_dtype):
    """In float64, of 65,536 weights that differ in their place alone; each goes to a neighbour."""
    weight = nn.Parameter(torch.full((256, 256), 1.5).bfloat16())
    optimizer = SGDPrune([weight], lr=0.5, state_dtype=state_dtype, implementation=implementation)
    weight.grad = torch.full_like(weight, 2.0**-10)
    optimizer.step()
    exact, ulp = 1.5 - 2.0**-11, 2.0**-7
    assert weight.unique().tolist() == [1.5 - ulp, 1.5]
    chance = 2.0**-11 / ulp
    error = ulp * (chance * (1 - chance) / weight.numel()) ** 0.5
    assert abs(float(weight.detach().double().mean()) - exact) < 4 * error


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_thousand_updates_of_a_sixteenth_ulp_arrive(implementation):
    """Where float32 does; rounded to nearest they stand still."""
    ends = {}
    for name, dtype, options in (
        ("float32", torch.float32, {}),
        ("chance", torch.bfloat16, {"state_dtype": "float32", "implementation": implementation}),
        ("nearest", torch.bfloat16, {}),
    ):
        weight = nn.Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = AdamWPrune([weight], lr=2.0**-11, weight_decay=0.0, **options)
        weight.grad = torch.full_like(weight, -1.0)
        for _ in range(2000):
            optimizer.step()
        ends[name] = float(weight.detach().double().mean())
    deviation = 2.0**-7 * (2000 / 16 * 15 / 16 / 4096) ** 0.5
    assert ends["float32"] == pytest.approx(1 + 2000 / 2048, abs=1e-3)
    assert abs(ends["chance"] - ends["float32"]) < 4 * deviation
    assert ends["nearest"] == 1.0


SHAPES = ((40, 120), (30,), (70, 64), (20, 9, 3, 3))
PRUNING = {"sparsity": 0.7, "begin_step": 2, "end_step": 12, "frequency": 2}
KINDS = [(AdamWPrune, {"lr": 1e-3}), (SGDPrune, {"lr": 1e-2}), (AdamWSPAM, {"lr": 1e-3, "reset_interval": 0})]
STATES = [{"state_dtype": "float32"}, {"state_dtype": "bfloat16"}, {"state_dtype": "int8"}, {"state_budget": "auto"}]


def weights():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]


def steps(optimizer, parameters, first, last):
    for number in range(first, last):
        generator = torch.Generator().manual_seed(100 + number)
        for weight in parameters:
            weight.grad = torch.randn(weight.shape, generator=generator).bfloat16()
        optimizer.step()


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("state", STATES)
def test_a_resume_equals_not_stopping_and_zeros_stay(kind, options, state):
    mine = weights()
    optimizer = kind(mine, **options, **state, **PRUNING)
    resumed = []
    for number in range(20):
        steps(optimizer, mine, number, number + 1)
        if number in (1, 7, 15):  # dense, while masks change, after them
            other = [nn.Parameter(weight.detach().clone()) for weight in mine]
            again = kind(other, **options, **state, **PRUNING)
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            resumed.append((number + 1, other, again))
    total = sum(weight.numel() for weight in mine if weight.ndim > 1)
    assert optimizer.pruning.sparsity() == (int(0.7 * total), total)
    for parameter, mask in optimizer.pruning.masks():
        kept = torch.zeros(mask.numel() * 8, dtype=torch.bool)
        for bit in range(8):
            kept[bit::8] = (mask >> bit & 1).bool()
        assert torch.equal(parameter.flatten() != 0, kept[: parameter.numel()])
    for number, other, again in resumed:
        steps(again, other, number, 20)
        assert all(map(torch.equal, mine, other))


@needs_native
@pytest.mark.parametrize(("kind", "options"), KINDS[:2])
@pytest.mark.parametrize("state", STATES)
def test_native_code_takes_them_and_trains_as_the_reference(kind, options, state, monkeypatch):
    used = set()
    original = kind.update_by_kernel
    monkeypatch.setattr(
        kind,
        "update_by_kernel",
        lambda self, bucket, group: (used.add((bucket.how, bucket.packed)), original(self, bucket, group))[1],
    )
    mine, theirs = weights(), weights()
    reference = kind(theirs, **options, **state, **PRUNING, implementation="reference")
    steps(reference, theirs, 0, 20)
    assert not used
    steps(kind(mine, **options, **state, **PRUNING), mine, 0, 20)
    assert used == {("native", False), ("native", True)}
    for one, other in zip(mine, theirs, strict=True):
        assert ((one == 0) == (other == 0)).float().mean() > 0.99
        kept = (one != 0) & (other != 0)
        assert (one - other)[kept].float().norm() <= 4e-3 * other.float().norm()


def test_without_a_dtype_of_the_moments_they_are_torchs():
    mine, theirs = weights(), weights()
    optimizer, plain = AdamWPrune(mine, lr=1e-3), torch.optim.AdamW(theirs, lr=1e-3, foreach=False)
    steps(optimizer, mine, 0, 5)
    steps(plain, theirs, 0, 5)
    assert all(map(torch.equal, mine, theirs))
