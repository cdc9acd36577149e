"""Clipping as torch and timm do it, and to the same bit wherever a gradient is cut."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils.clip_grad import dispatch_clip_grad
from torch import nn

from toolkit.engine.clip import Part, clip, total_norm

SHAPES = [(7, 3, 2, 2), (5,), (1, 4), (6, 5), (6,), (4, 6), (4,)]
CPU = torch.device("cpu")


def parameters():
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for number, parameter in enumerate(made):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (number % 3 - 2)
    made[2].grad = None
    return made


def whole(made):
    return [Part(p.detach(), p.grad, 0, p.shape) for p in made]


def clipped(made, mode, limit):
    parts = whole(made)
    norm = total_norm(parts, CPU, lambda values: values)
    clip(parts, norm, limit, mode, lambda values: values)
    return norm


LIMITS = {"norm": (0.5, 1e6), "value": (0.05, 1e6), "agc": (0.02, 1e6)}


@pytest.mark.parametrize("mode", LIMITS)
def test_as_torch_and_timm_clip(mode):
    for limit in LIMITS[mode]:
        mine, theirs = parameters(), parameters()
        norm = torch.nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None])
        dispatch_clip_grad(theirs if mode != "agc" else theirs[:-2], limit, mode=mode)
        assert float(clipped(mine, mode, limit)) == pytest.approx(float(norm), rel=1e-6)
        for one, other, before in zip(mine, theirs, parameters(), strict=True):
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)
                assert limit < 1e6 or torch.equal(one.grad, before.grad)
        assert limit == 1e6 or any(
            not torch.equal(one.grad, before.grad)
            for one, before in zip(mine, parameters(), strict=True)
            if one.grad is not None
        )


def cut_at(made, cuts, rank):
    """This rank's parts where the parameters, one behind the other, are cut at two places."""
    begin, end, offset, parts = [0, *cuts, 10**6][rank], [0, *cuts, 10**6][rank + 1], 0, []
    for p in made:
        first, last = max(0, begin - offset), min(p.numel(), end - offset)
        held = first < last and p.grad is not None
        parts.append(
            Part(
                p.detach().view(-1)[first : max(first, last)],
                p.grad.view(-1)[first:last] if held else None,
                first if held else 0,
                p.shape,
            )
        )
        offset += p.numel()
    return parts


@pytest.mark.parametrize("mode", LIMITS)
@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, sum(torch.Size(s).numel() for s in SHAPES)), min_size=2, max_size=2).map(sorted))
def test_wherever_it_is_cut(mode, cuts):
    wanted, made = parameters(), parameters()
    norm = clipped(wanted, mode, LIMITS[mode][0])
    ranks = [cut_at(made, cuts, rank) for rank in range(3)]
    shares = []

    def keep(values):
        shares.append(values.clone())
        return values

    for parts in ranks:
        total_norm(parts, CPU, keep)
    torch.testing.assert_close(sum(shares).sum().sqrt(), norm, rtol=1e-14, atol=0)
    shares.clear()
    for parts in copy.deepcopy(ranks):  # once for what each rank adds to the rows' sums, once with all of them
        clip(parts, norm, LIMITS[mode][0], mode, keep)
    for parts in ranks:
        clip(parts, norm, LIMITS[mode][0], mode, lambda values: sum(shares))
    for one, other in zip(made, wanted, strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad)
