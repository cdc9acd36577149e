"""Moments in 8 bits: what the format keeps, that it keeps it twice, and that native code keeps the same."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import block_offsets
from torch import Tensor

from toolkit.kernels import native
from toolkit.kernels.compiled import available
from toolkit.kernels.narrow import GROUP, narrow, num_groups, places_of, widen
from toolkit.kernels.reference import adam_update, sgd_update
from toolkit.kernels.rounding import round_to_bfloat16
from toolkit.prune.mask import pack_bits
from toolkit.prune.moments import exponents_of, read_moment, write_piece
from toolkit.prune.packing import pack
from toolkit.prune.spans import make_spans

CPU = torch.device("cpu")


def _values(count: int, spread: float, seed: int, signed: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.randn(count, generator=generator) * spread) * 1e-3
    sign = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0) if signed else torch.ones(count)
    return torch.where(torch.rand(count, generator=generator) < 0.1, 0.0, size * sign)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1500), st.floats(0, 6), st.integers(0, 2**31), st.booleans(), st.floats(0, 0.95))
def test_what_was_narrowed_narrows_to_the_same_codes_again(
    numel: int, spread: float, seed: int, signed: bool, sparsity: float
) -> None:
    bits = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) >= sparsity
    places = places_of(bits, numel, device=CPU)
    values = _values(len(places), spread, seed, signed)
    first = narrow(values, places, num_groups(numel), signed=signed, seed=seed)
    wide = widen(*first, places, signed=signed)
    again = narrow(wide, places, num_groups(numel), signed=signed)
    assert torch.equal(again[1], first[1])
    assert torch.equal(widen(*again, places, signed=signed), wide)
    assert torch.equal(again[0][wide != 0], first[0][wide != 0])
    assert torch.equal(wide == 0, values == 0) or signed  # a squared moment above 0 never becomes 0, and 0 stays 0
    assert not wide[values == 0].any()


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.floats(0, 1.5), st.integers(0, 2**31))
def test_values_within_reach_go_to_the_nearest_code(signed: bool, spread: float, seed: int) -> None:
    """A group's largest too: what is near the next power of two rounds up to it."""
    values, places = _values(GROUP, spread, seed, signed), places_of(None, GROUP, device=CPU)
    wide = widen(*narrow(values, places, 1, signed=signed), places, signed=signed)
    within = values.abs() > values.abs().max() * 2.0 ** (-14 if signed else -30)
    assert within.sum() > 150
    half_a_step = torch.exp2(values.frexp().exponent - 1.0) / 16
    assert ((wide - values).abs() <= half_a_step)[within].all()


@pytest.mark.parametrize("growth", [-1 / 800, 0.0, 1 / 800])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_rounding_by_chance_keeps_the_mean_of_a_slow_average(growth: float, spread: float) -> None:
    """2,000 steps of beta2 = 0.999 against float32, gradients that fall (and in the end are 0), stay or grow.

    A group's largest as well: while the exponent was that of the exact value, none went over a power of two.
    """
    generator = torch.Generator().manual_seed(0)
    groups, numel = 32, 32 * GROUP
    places = places_of(None, numel, device=CPU)
    scale = torch.exp(torch.randn(numel, generator=generator) * spread) * 1e-3
    exact = torch.zeros(numel)
    kept = narrow(exact, places, groups, signed=False)
    for step in range(2000):
        rate = 0.0 if step > 1500 and growth < 0 else math.exp(step * growth)
        square = (torch.randn(numel, generator=generator) * scale * rate).square()
        exact = exact * 0.999 + square * 0.001
        moved = widen(*kept, places, signed=False) * 0.999 + square * 0.001
        kept = narrow(moved, places, groups, signed=False, seed=step)
    ratio = widen(*kept, places, signed=False) / exact
    largest = ratio.view(groups, GROUP)[exact.view(groups, GROUP) > exact.view(groups, GROUP).amax(1, keepdim=True) / 4]
    assert abs(ratio.mean() - 1) < 0.03
    assert abs(largest.mean() - 1) < 0.06
    assert ratio.std() < 0.5
    assert (ratio > 0).all()


@pytest.mark.parametrize(
    "bits", [0x7FC00000, 0x7F800000, 0x7FFFFFFF, 0x7F800001]
)  # NaN, infinity, a GPU's NaN, another
def test_values_that_are_not_finite_stay_loud(bits: int) -> None:
    values = torch.ones(300)
    values.view(torch.int32)[280] = bits
    for signed in (True, False):
        places = places_of(None, 300, device=CPU)
        wide = widen(*narrow(values, places, 2, signed=signed, seed=1), places, signed=signed)
        assert not wide[280].isfinite()
        assert torch.equal(wide[:GROUP], values[:GROUP])
        state = {
            key: torch.zeros(300, dtype=torch.uint8) for key in ("m", "m_sq")
        }  # by native code, where there is any
        state |= {exponents_of(key): torch.zeros(2, dtype=torch.uint8) for key in ("m", "m_sq")}
        key, spans = "m" if signed else "m_sq", make_spans(300, [])
        write_piece(state, key, values, None, 0, 300, 0, spans)
        again = read_moment(state, key, None, 300, spans)
        assert not again[280].isfinite()
        assert torch.equal(again[:GROUP], values[:GROUP])


def test_shards_cut_at_groups_have_the_codes_of_the_whole() -> None:
    values, cut = _values(5 * GROUP, 2.0, 1, False), 2 * GROUP
    whole = narrow(values, places_of(None, 5 * GROUP, device=CPU), 5, signed=False, seed=9)
    for first, last in ((0, cut), (cut, 5 * GROUP)):
        places = places_of(None, last - first, first, device=CPU)
        own = narrow(values[first:last], places, num_groups(last - first), signed=False, seed=9, first=first)
        assert torch.equal(own[0], whole[0][first:last])
        assert torch.equal(own[1], whole[1][first // GROUP : last // GROUP])


@pytest.mark.skipif(not available(), reason="no C++ compiler")
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits8", [True, False])
@pytest.mark.parametrize("sparsity", [None, 0.0, 0.7, 0.97])
@pytest.mark.parametrize("numel", [5, 4096 + 300])
@pytest.mark.parametrize("rule", ["adam", "amsgrad", "sgd"])
def test_native_code_keeps_what_the_reference_keeps(
    rule: str, numel: int, sparsity: float | None, bits8: bool, isa: str
) -> None:
    if native.ISAS.index(isa) > native.ISAS.index(native.best_isa()):
        pytest.skip(f"this processor has no {isa}")
    generator = torch.Generator().manual_seed(numel)
    weight, grad = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator) * 0.01
    keep = None if sparsity is None else torch.rand(numel, generator=generator) >= sparsity
    mask = None if keep is None else pack_bits(keep)
    offsets = None if mask is None else block_offsets(mask, numel)[0]
    places = places_of(keep, numel, device=CPU)
    signs = {"adam": [True, False], "amsgrad": [True, False, False], "sgd": [True]}[rule]
    start = [_values(len(places), 1.5, 5 + number, signed) for number, signed in enumerate(signs)]
    groups, seed = num_groups(numel), 77
    if bits8:
        kept = [narrow(value, places, groups, signed=signed) for value, signed in zip(start, signs, strict=True)]
        wide = [widen(*pair, places, signed=signed) for pair, signed in zip(kept, signs, strict=True)]
    else:
        kept = [(value.bfloat16(), torch.zeros(0)) for value in start]
        wide = [codes.float() for codes, _ in kept]
    own, slope = (weight, grad) if mask is None else (pack(weight, mask, len(places)), pack(grad, mask, len(places)))
    own, weight_of_native = own.clone(), weight.clone()
    row = native.PackedTensor(
        weight_of_native, grad, mask, offsets, [codes for codes, _ in kept], [e for _, e in kept] if bits8 else (), seed
    )
    if rule == "sgd":
        hyper = {
            "lr": 0.1,
            "momentum": 0.9,
            "dampening": 0.0,
            "weight_decay": 0.01,
            "nesterov": True,
            "decoupled": True,
        }
        native.packed_sgd([row], step=3, isa=isa, **hyper)
        sgd_update(own, slope, *wide, first=False, **hyper)
    else:
        hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "decoupled": True}
        native.packed_adam([row], step=3, isa=isa, **hyper)
        adam_update(own, slope, wide[0], wide[1], wide[2] if rule == "amsgrad" else None, step=3, **hyper)
    after = weight_of_native if keep is None else weight_of_native[keep]
    torch.testing.assert_close(after, own, rtol=1e-5, atol=1e-7)
    assert keep is None or not weight_of_native[~keep].any()
    for number, (signed, value, (codes, exponents)) in enumerate(zip(signs, wide, kept, strict=True)):
        if bits8:
            wanted, wanted_exponents = narrow(value, places, groups, signed=signed, seed=seed + number)
            assert (exponents != wanted_exponents).sum() <= 1  # a last bit may tip a group's largest value over
            apart = (codes.int() & 127) - (wanted.int() & 127) if signed else codes.int() - wanted.int()
        else:
            wanted = round_to_bfloat16(value, seed + number)
            apart = codes.view(torch.int16).int() - wanted.view(torch.int16).int()
        assert (apart != 0).float().mean() < 0.01
        assert not len(apart) or apart.abs().max() <= (8 if bits8 else 1)
