import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.prune.distribution import zero_quotas
from toolkit.prune.select import choose_lowest

shapes = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=8)


def count(shape):
    return int(torch.Size(shape).numel())


@settings(max_examples=200)
@given(shapes, st.sampled_from(["layer", "erk"]), st.floats(0, 0.99), st.floats(0, 0.99))
def test_quotas_add_up_grow_and_empty_no_tensor(shapes, scope, early, late):
    early, late = sorted((early, late))
    total = sum(map(count, shapes))
    now = [0] * len(shapes)
    for share in (early, late):
        zeros = int(share * total)
        quotas = zero_quotas(scope, shapes, now, zeros)
        assert sum(quotas) == zeros
        assert all(quota >= before for quota, before in zip(quotas, now, strict=True))
        if zeros <= total - len(shapes):
            assert all(quota < count(shape) for quota, shape in zip(quotas, shapes, strict=True))
        now = quotas


def test_layer_is_the_same_share_everywhere():
    assert zero_quotas("layer", [(10, 10), (20, 10), (7, 10)], [0, 0, 0], 185) == [50, 100, 35]


def test_erk_keeps_small_tensors_denser():
    wide, narrow, tiny = (256, 256, 3, 3), (128, 128, 3, 3), (32, 32, 3, 3)
    zeros = int(0.9 * sum(map(count, (wide, narrow, tiny))))
    quotas = zero_quotas("erk", [wide, narrow, tiny], [0, 0, 0], zeros)
    left = [1 - quota / count(shape) for quota, shape in zip(quotas, (wide, narrow, tiny), strict=True)]
    assert left[0] < left[1] < left[2]
    assert sum(quotas) == zeros
    # RigL's formula: densities of tensors that are not full relate as sum(shape) / prod(shape)
    wanted = (sum(wide) / count(wide)) / (sum(narrow) / count(narrow))
    assert left[1] < 0.999
    assert left[0] / left[1] == pytest.approx(wanted, rel=0.01)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_lowest_leaves_each_tensor_one(sizes, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    # The first tensor's scores are all lower than the others': it would be emptied first.
    scores = [torch.rand(size, generator=generator) + 10 * number for number, size in enumerate(sizes)]
    k = data.draw(st.integers(0, sum(sizes)))
    pieces = [lambda t=t: t.split(7) for t in scores]
    marks = list(choose_lowest(pieces, [str(i) for i in range(len(sizes))], sizes, k))
    assert sum(int(mark.sum()) for mark in marks) == k
    if k <= sum(sizes) - len(sizes):
        for mark, score in zip(marks, scores, strict=True):
            assert not mark.all()
            if mark.any():
                assert score[mark].max() < score[~mark].max()
