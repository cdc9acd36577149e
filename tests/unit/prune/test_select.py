import unittest.mock
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.kernels import native
from toolkit.prune import select
from toolkit.prune.select import CHUNK, choose_lowest, find_threshold

special = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-40, 1.0, -1.0, float("inf"), -float("inf"), 3.4e38])
numbers = st.one_of(special, st.floats(width=32, allow_nan=False))


def take_lowest(tensors, k, pieces=1):
    sources = [lambda t=t: t.tensor_split(pieces) for t in tensors]
    threshold = find_threshold(sources, [str(i) for i in range(len(tensors))], k)
    return [torch.cat([threshold.take(piece, i) for piece in source()]) for i, source in enumerate(sources)]


def expected_lowest(tensors, k):
    values = np.concatenate([t.numpy() for t in tensors]) + np.float32(0)
    lowest = np.argsort(values, kind="stable")[:k]
    marks = np.zeros(len(values), dtype=bool)
    marks[lowest] = True
    return torch.from_numpy(marks).split([len(t) for t in tensors])


@pytest.mark.parametrize("code", ["native", "torch"])
@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(numbers, min_size=1, max_size=40), min_size=1, max_size=4), st.data(), st.integers(1, 5))
def test_equals_a_stable_sort(code, lists, data, pieces):
    tensors = [torch.tensor(values, dtype=torch.float32) for values in lists]
    k = data.draw(st.integers(0, sum(map(len, lists))))
    with unittest.mock.patch.object(native, "fits", return_value=False) if code == "torch" else nullcontext():
        found = take_lowest(tensors, k, pieces)
    for got, wanted in zip(found, expected_lowest(tensors, k), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("k", [0, 1, 12345, 500_000, 599_999, 600_000])
def test_many_scores_in_chunks(k):
    generator = torch.Generator().manual_seed(k)
    scores = [torch.randn(n, generator=generator).round(decimals=2) for n in (350_000, 250_000)]  # many ties
    threshold = find_threshold([lambda s=s: s.split(CHUNK) for s in scores], ["a", "b"], k)
    got = [torch.cat([threshold.take(piece, i) for piece in s.split(CHUNK)]) for i, s in enumerate(scores)]
    for mine, wanted in zip(got, expected_lowest(scores, k), strict=True):
        assert torch.equal(mine, wanted)


def test_ties_go_in_order_of_parameter_and_index():
    tensors = [torch.ones(3), torch.ones(4)]
    first, second = take_lowest(tensors, 5)
    assert first.tolist() == [True] * 3
    assert second.tolist() == [True, True, False, False]


def test_nan_names_the_parameter():
    with pytest.raises(ValueError, match=r"conv2\.weight is NaN"):
        find_threshold(
            [lambda: [torch.ones(2)], lambda: [torch.tensor([1.0, float("nan")])]], ["conv1.weight", "conv2.weight"], 1
        )


def choose(tensors, k):
    names, sizes = [f"layer{i}" for i in range(len(tensors))], [len(t) for t in tensors]
    return list(choose_lowest([lambda t=t: [t] for t in tensors], names, sizes, k))


def test_an_infinite_score_is_as_loud_as_nan():
    with pytest.raises(ValueError, match=r"the pruning score of layer1 is infinite"):
        choose([torch.tensor([3.0e38, -torch.inf]), torch.tensor([1.0, torch.inf])], 1)


@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=8), seed=st.integers(0, 500), data=st.data())
@settings(max_examples=150, deadline=None)
def test_as_many_layers_as_possible_keep_a_weight(sizes, seed, data):
    """Also where fewer survive than there are layers: then the best of the best layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(n, generator=generator) * 10.0 ** (3 * i) for i, n in enumerate(sizes)]
    k = data.draw(st.integers(0, sum(sizes)))
    marks = choose(tensors, k)
    assert sum(int(mark.sum()) for mark in marks) == k
    left = sum(sizes) - k
    assert sum(not mark.all() for mark in marks) == min(left, len(sizes))
    for tensor, mark in zip(tensors, marks, strict=True):
        if mark.any() and not mark.all():
            assert tensor[~mark].min() >= tensor[mark].max()


def test_many_small_tensors_take_no_more_memory_than_their_weights(monkeypatch):
    """Of what is kept from one pass to the next; whole histograms took 32 KiB a tensor."""
    tensors = [torch.randn(96, generator=torch.Generator().manual_seed(i)) for i in range(500)]
    kept = []
    original = select._count_digits

    def counting(*arguments):
        total = original(*arguments)
        kept.append(total.nbytes)
        return total

    monkeypatch.setattr(select, "_count_digits", counting)
    find_threshold([lambda t=t: [t] for t in tensors], [str(i) for i in range(500)], 20_000)
    assert max(kept) <= sum(t.nbytes for t in tensors) / 10
