"""Which channels go: those that a plain loop over small layers chooses, by one score or layer by layer."""

import math
import statistics
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from channel_chain import chain, gradients, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit.prune.channel_update import most_at_once
from toolkit.prune.channels import ChannelGroup, ChannelSlice


@pytest.mark.parametrize("sparsity", [0.2, 0.3, 0.5, 0.7, 0.9])
def test_the_choice_is_that_of_a_plain_loop_in_float64(sparsity):
    """Mean |w| over a channel's weights; a weight of two removed channels counts once."""
    parameters, groups = chain()
    whole = {name: parameter.detach().double().clone() for name, parameter in parameters.items()}
    optimizer = make(parameters, groups, sparsity=sparsity, end_step=1)
    gradients(parameters.values(), 0)
    optimizer.step()
    scores = {}
    for group in groups:
        for channel in range(group.count):
            parts = [whole[s.name].select(s.axis, channel).abs() for s in group.slices]
            scores[group.name, channel] = torch.cat(parts).mean().item()
    keep = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in whole.items()}
    total, left = sum(weight.numel() for weight in whole.values()), {"a": 6, "b": 5}
    by_name = {group.name: group for group in groups}
    for (name, channel), _ in sorted(scores.items(), key=lambda item: item[1]):
        if left[name] == 1:
            continue
        trial = {key: mask.clone() for key, mask in keep.items()}
        for one in by_name[name].slices:
            trial[one.name].select(one.axis, channel).fill_(False)
        if sum(int((~mask).sum()) for mask in trial.values()) > math.floor(sparsity * total):
            break
        keep, left[name] = trial, left[name] - 1
    for name, parameter in parameters.items():
        assert torch.equal(parameter != 0, keep[name]), name
    zeros = sum(int((~mask).sum()) for mask in keep.values())
    assert optimizer.pruning.sparsity() == (zeros, total)


def mlp(widths, seed=0):
    """Layers of these widths in a row, the inner ones in groups; each weight once."""
    generator = torch.Generator().manual_seed(seed)
    weights = {str(n): torch.randn(out, into, generator=generator) for n, (into, out) in enumerate(pairwise(widths))}
    parameters = {name: nn.Parameter(weight) for name, weight in weights.items()}
    groups = [
        ChannelGroup(
            str(n),
            width,
            tuple(ChannelSlice(str(n + axis), axis, torch.arange(width).unsqueeze(1)) for axis in (0, 1)),
        )
        for n, width in enumerate(widths[1:-1])
    ]
    return parameters, groups


def ranked_by_hand(groups, keep, whole, scope, multiple):
    """(rank, group, channels before, channels) in turn: fractions by layer, else means of scores over what is left."""
    turns = []
    for number, group in enumerate(groups):
        scores = {}
        for channel in range(group.count):
            parts = [whole[one.name].select(one.axis, channel) for one in group.slices]
            marks = [keep[one.name].select(one.axis, channel) for one in group.slices]
            left = torch.cat([part[mark] for part, mark in zip(parts, marks, strict=True)])
            if len(left):
                scores[channel] = left.double().abs().mean().float().item()
        order = sorted(scores, key=scores.get)
        over = len(order) % multiple
        for begin in [*([0] if over else []), *range(over, len(order), multiple)]:
            channels = order[begin : begin + (over if begin < over else multiple)]
            rank = statistics.fmean(scores[channel] for channel in channels)
            if scope == "layer":
                rank = Fraction(2 * (group.count - len(order) + begin) + len(channels), 2 * group.count)
            turns.append((rank, number, begin, channels))
    return sorted(turns)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=3, max_size=6),
    st.floats(0.02, 0.98),
    st.integers(1, 4),
    st.sampled_from(["global", "layer"]),
    st.integers(1, 4),
    st.integers(0, 9),
)
def test_every_choice_is_that_of_a_plain_loop(widths, sparsity, end_step, scope, multiple, seed):
    """Channels go in turn until one lacks room; the weights that are gone are counted in whole masks."""
    parameters, groups = mlp(widths, seed)
    whole = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    total = sum(weight.numel() for weight in whole.values())
    options = {"sparsity": sparsity, "end_step": end_step, "scope": scope, "channel_multiple": multiple}
    if max(widths[1:-1]) <= multiple:
        with pytest.raises(ValueError, match="no layer has more channels"):
            make(parameters, groups, **options)
        return
    optimizer = make(parameters, groups, **options)
    keep = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in whole.items()}
    left = [group.count for group in groups]
    for step in range(1, end_step + 1):
        wanted = optimizer.pruning.schedule.num_zeros_at(step, total)
        for _, number, _, channels in ranked_by_hand(groups, keep, whole, scope, multiple):
            if left[number] == len(channels):
                continue
            trial = {name: mask.clone() for name, mask in keep.items()}
            for one in groups[number].slices:
                trial[one.name].index_fill_(one.axis, torch.tensor(channels), False)
            if sum(int((~mask).sum()) for mask in trial.values()) > wanted:
                break
            keep, left[number] = trial, left[number] - len(channels)
        gradients(parameters.values(), step)
        if step == end_step and all(mask.all() for mask in keep.values()):
            with pytest.raises(ValueError, match=r"is less than any one channel"):
                optimizer.step()
            return
        optimizer.step()
        for name, parameter in parameters.items():
            assert torch.equal(parameter != 0, keep[name]), name
    assert all(count % multiple == 0 or count == group.count for count, group in zip(left, groups, strict=True))


def test_layers_that_lose_nothing_do_not_widen_an_automatic_budget():
    """Of 6 channels none go where a multiple of 16 stays; the others go 16 at once."""
    parameters, groups = mlp([64, 128, 6, 64])
    assert most_at_once(groups[1:], parameters, 16) == 0
    assert most_at_once(groups, parameters, 16) == 16 * (64 + 6)
    assert most_at_once(groups, parameters, 1) == 128 + 64


def test_no_layer_loses_its_last_channel():
    parameters, groups = chain()
    with torch.no_grad():
        parameters["a"].mul_(1e-6)
    optimizer = make(parameters, groups, sparsity=0.99, end_step=1)
    gradients(parameters.values(), 0)
    optimizer.step()
    assert int((parameters["a"] != 0).any(1).sum()) == int((parameters["b"] != 0).any(1).sum()) == 1
