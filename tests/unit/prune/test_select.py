import unittest.mock
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.kernels import bits as native_bits
from toolkit.prune.select import CHUNK, find_threshold

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
    with unittest.mock.patch.object(native_bits, "fits", return_value=False) if code == "torch" else nullcontext():
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
