"""Blocks and groups begin at the same weights however parameters are cut: in parts of one, in slices of several."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit.kernels.narrow import GROUP, num_groups
from toolkit.optim import AdamWPrune, SGDPrune
from toolkit.prune.hooks import pruned_by_hooks
from toolkit.prune.spans import BLOCK, Range, make_spans, num_blocks_of, num_groups_of, span_at

SIZES = (5024, 4096 + 32, 7000)  # weights of three parameters


def slices(sizes, cuts):
    """(first and last weight, ranges) of the parts into which parameters that lie side by side are cut."""
    made = []
    for begin, end in itertools.pairwise((0, *cuts, sum(sizes))):
        ranges, offset = [], 0
        for number, size in enumerate(sizes, start=1):
            first, last = max(begin, offset), min(end, offset + size)
            empty = first >= last
            at = (0, 0, 0) if empty else (first - begin, last - begin, first - offset)
            ranges.append(Range(str(number), *at, number))
            offset += size
        made.append((begin, end, ranges))
    return made


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    shares=st.lists(st.floats(0, 1), max_size=3),
    step=st.sampled_from([1, 32]),
    padding=st.integers(0, 70),
)
@settings(max_examples=200, deadline=None)
def test_spans_cover_a_part_and_have_the_groups_of_whole_parameters(sizes, shares, step, padding):
    cuts = sorted(int(share * sum(sizes)) // step * step for share in shares)
    for begin, end, ranges in slices([size // step * step + step for size in sizes], cuts):
        spans = make_spans(end - begin + padding, ranges)
        assert [span.first for span in spans] == [0, *(span.last for span in spans[:-1])]
        assert spans[-1].last == end - begin + padding
        assert all(span.first % 32 == 0 for span in spans)
        assert num_groups_of(spans) == sum(num_groups(span.numel) for span in spans)
        assert num_blocks_of(spans) == sum(-(-span.numel // BLOCK) for span in spans)
        for _, first, last, place, number in ranges:
            if step == 32:  # begins with a word of the mask
                for weight in range(first, last):
                    span = span_at(spans, weight)
                    assert span.number == number
                    assert (span.place + weight - span.first) == place + weight - first


def train(kind, parameters, gradients, parts, **options):
    schedule = {"sparsity": 0.8, "begin_step": 4, "end_step": 10, "frequency": 3}
    optimizer = kind([{"params": parameters, "prunable": True}], lr=1e-2, **schedule, **options)
    optimizer.pruning.flat_slices = dict(zip(parameters, parts, strict=True)) if parts else {}
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    dense = optimizer.state_dict()["state"]
    again = kind([{"params": parameters, "prunable": True}], lr=1e-2, **schedule, **options)
    again.pruning.flat_slices = optimizer.pruning.flat_slices
    again.load_state_dict(optimizer.state_dict())
    for parameter in parameters:
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, again.state[parameter][key]), key
    return torch.cat([p.detach() for p in parameters]), [
        torch.cat([state[key] for state in dense.values()]) for key in optimizer.MOMENTS if key in dense[0]
    ]


@pytest.mark.parametrize("kind", [AdamWPrune, SGDPrune])
@pytest.mark.parametrize("implementation", ["reference", "auto"])
@pytest.mark.parametrize("precision", [{"state_dtype": "int8"}, {"state_dtype": "float32"}, {"state_budget": "auto"}])
@pytest.mark.parametrize("steps", [3, 14])
def test_slices_have_the_moments_of_their_parameters(kind, implementation, precision, steps):
    """Cut where a group ends nothing differs; cut within one that group's codes may, and by them a mask's bit or two.

    A budget's ramp has bfloat16 in it, which is rounded by chances of the slice's own.
    """
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(sum(SIZES), generator=generator)
    gradients = [torch.randn(sum(SIZES), generator=generator) for _ in range(steps)]

    def parts_at(at, ranges=None):
        parameters = [nn.Parameter(whole[slice(*one)].clone()) for one in at]
        shown = [[gradient[slice(*one)].clone() for one in at] for gradient in gradients]
        return train(kind, parameters, shown, ranges, implementation=implementation, **precision)

    ends = (0, *itertools.accumulate(SIZES))
    weights, moments = parts_at(list(itertools.pairwise(ends)))
    for within in (0, 96):
        parts = slices(SIZES, [SIZES[0] + 4 * GROUP + within])
        found, own = parts_at([part[:2] for part in parts], [part[2] for part in parts])
        masks = (found == 0) != (weights == 0)
        differ = [masks, *(mine != theirs for mine, theirs in zip(own, moments, strict=True))]
        if "state_budget" not in precision:
            assert all(one.float().mean() <= (0.02 if within else 0) for one in differ)
        assert masks.float().mean() <= 0.001


@pytest.mark.parametrize("kind", [AdamWPrune, pruned_by_hooks(AdamWPrune, "magnitude")])
@pytest.mark.parametrize("state_dtype", ["int8", "float32"])
def test_a_copy_and_what_is_saved_know_the_slices(kind, state_dtype):
    """Pruned by hooks, too, where the moments are dense: coded by some spans, they are read by the same."""
    torch.manual_seed(0)
    (_, end, ranges), *_ = slices(SIZES, [])
    flat = nn.Parameter(torch.randn(end))
    schedule = {"sparsity": 0.8, "begin_step": 1, "end_step": 4, "frequency": 3}
    optimizer = kind([{"params": [flat], "prunable": True}], lr=1e-2, state_dtype=state_dtype, **schedule)
    optimizer.pruning.flat_slices = {flat: ranges}
    seen = torch.zeros(end)
    for _ in range(5):
        flat.grad = torch.randn(end)
        seen = seen.maximum(flat.grad.abs())
        optimizer.step()
    saved = optimizer.state_dict()["state"][0]["exp_avg"]
    assert (saved.abs() <= 1.1 * seen).all()  # an average, with a code's rounding
    if kind is AdamWPrune:
        again, copied = copy.deepcopy((flat, optimizer))
        for one, stepped in ((flat, optimizer), (again, copied)):
            one.grad = torch.ones(end)
            stepped.step()
        assert torch.equal(again, flat)
