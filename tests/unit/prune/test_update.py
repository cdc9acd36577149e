"""One mask update for all: flat slices with padding choose as whole tensors do, with packed moments and with hooks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit.optim.adamwprune import AdamWPrune
from toolkit.prune.hooks import pruned_by_hooks
from toolkit.prune.mask import pack_bits, unpack_bits
from toolkit.prune.packing import count_survivors, range_bits, survivors_before
from toolkit.prune.spans import Range
from toolkit.prune.stores import pack_pieces

SCHEDULE = {"sparsity": 0.7, "begin_step": 0, "end_step": 9, "frequency": 3}
KINDS = {
    "packed": lambda params: AdamWPrune(params, lr=1e-2, **SCHEDULE),
    "packed, regrowing": lambda params: AdamWPrune(params, lr=1e-2, regrow=0.3, **SCHEDULE),
    **{
        score: lambda params, score=score: pruned_by_hooks(
            torch.optim.AdamW, "magnitude" if score == "magnitude" else "movement"
        )(params, lr=1e-2, score=score, **SCHEDULE)
        for score in ("magnitude", "movement", "displacement")
    },
}


def tensors(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


@pytest.mark.parametrize("kind", KINDS)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 12),
    padding=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_a_flat_slice_is_pruned_as_its_parameters_are(kind, sizes, padding, seed):
    """Ranges begin within bytes of the mask; padding, whatever is in it, counts for nothing and goes first."""
    apart = [nn.Parameter(tensor) for tensor in tensors(sizes, seed)]
    flat = nn.Parameter(torch.cat([*apart, torch.full((padding,), 7.0)]).detach().clone())
    one = KINDS[kind]([{"params": apart, "prunable": True}])
    two = KINDS[kind]([{"params": [flat], "prunable": True}])
    ends = torch.tensor(sizes).cumsum(0).tolist()
    two.pruning.flat_slices = {
        flat: [Range(str(i), e - s, e) for i, (s, e) in enumerate(zip(sizes, ends, strict=True))]
    }
    for step in range(12):
        gradients = tensors(sizes, 1000 * seed + step)
        for parameter, gradient in zip(apart, gradients, strict=True):
            parameter.grad = gradient
        flat.grad = torch.cat([*gradients, torch.ones(padding)])
        one.step()
        two.step()
        # Vectorised arithmetic may round by where an element lies; the masks are exact.
        whole = torch.cat(apart)
        assert torch.equal(flat[: ends[-1]] == 0, whole == 0), step
        torch.testing.assert_close(flat[: ends[-1]], whole, rtol=1e-5, atol=1e-6)
    assert one.pruning.sparsity() == two.pruning.sparsity() == (math.floor(0.7 * sum(sizes)), sum(sizes))
    assert not unpack_bits(two.state[flat]["mask"], flat.numel())[ends[-1] :].any()


@given(
    bits=st.lists(st.booleans(), min_size=1, max_size=3000), cuts=st.tuples(st.integers(0, 3000), st.integers(0, 3000))
)
@settings(max_examples=80, deadline=None)
def test_pack_range(bits, cuts):
    keep = torch.tensor(bits)
    first, last = sorted(min(cut, len(bits)) for cut in cuts)
    values = torch.arange(len(bits), dtype=torch.float32)
    mask = pack_bits(keep)
    bits_of_range, count = range_bits(mask, first, last), int(count_survivors(mask, first, last))
    (packed,) = pack_pieces([[values[first:last]]], [bits_of_range], count)
    assert torch.equal(packed, values[first:last][keep[first:last]])
    (packed,) = pack_pieces([[values[first:last]]], [None], last - first)
    assert torch.equal(packed, values[first:last])
    assert survivors_before(mask, first) == int(keep[:first].sum())


def test_sparsity_counts_what_the_model_has():
    weight, norm = nn.Parameter(torch.randn(20, 10)), nn.Parameter(torch.ones(10))
    optimizer = AdamWPrune([{"params": [weight], "prunable": True}, {"params": [norm], "prunable": False}], **SCHEDULE)
    with torch.no_grad():
        weight[0] = 0.0
        norm.zero_()
    assert optimizer.pruning.sparsity() == (10, 200)
    assert not optimizer.state  # asking makes nothing
