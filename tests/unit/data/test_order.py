import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.data.order import (
    PADDING,
    epoch_order,
    epoch_windows,
    evaluation_slices,
    micro_batch_slice,
    repeated,
)

shards = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 0)


@given(shards, st.integers(0, 2**40), st.integers(0, 1000), st.one_of(st.none(), st.integers(1, 15)))
def test_order_is_a_permutation_and_repeats(lengths, seed, epoch, window):
    order = epoch_order(lengths, seed, epoch, window)
    assert sorted(order.tolist()) == list(range(sum(lengths)))
    assert np.array_equal(order, epoch_order(lengths, seed, epoch, window))


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 4))
def test_a_global_batch_has_copies_of_its_own_images(repeats, size, steps):
    places, copies = repeated(np.arange(steps * size), size, repeats)
    images = -(-size // repeats)
    assert places.max() == steps * images - 1 < steps * size  # no more than an epoch without copies reads
    for step in range(steps):
        batch = slice(step * size, (step + 1) * size)
        pairs = set(zip(places[batch].tolist(), copies[batch].tolist(), strict=True))
        assert len(pairs) == size
        assert {place for place, _ in pairs} == set(range(step * images, (step + 1) * images))
        assert copies[batch].max() < repeats
        for place in {place for place, _ in pairs}:
            numbers = sorted(copy for one, copy in pairs if one == place)
            assert numbers == list(range(len(numbers)))
    if repeats == 1:
        assert places.tolist() == list(range(steps * size))


def test_epochs_and_seeds_differ():
    orders = [epoch_order([50] * 4, seed, epoch).tolist() for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_a_window_mixes_only_its_shards():
    order = epoch_order([10] * 6, 0, 0, window=2)
    for start in range(0, 60, 20):
        assert len({sample // 10 for sample in order[start : start + 20].tolist()}) == 2


@given(shards, st.integers(0, 99), st.integers(1, 15))
def test_windows_say_which_shards_an_order_reads_next(lengths, seed, window):
    order = epoch_order(lengths, seed, 1, window)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    starts, groups = epoch_windows(lengths, seed, 1, window)
    assert starts[-1] == len(order)
    for start, end, group in zip(starts, starts[1:], groups, strict=False):
        assert set(owner[order[start:end]].tolist()) == {shard for shard in group if lengths[shard]}


@settings(max_examples=60)
@given(shards, st.integers(0, 99), st.sampled_from([(1, 1, 12), (2, 1, 6), (1, 2, 6), (3, 2, 2), (2, 3, 2), (4, 3, 1)]))
def test_global_batches_do_not_depend_on_ranks_or_accumulation(lengths, seed, layout):
    num_ranks, accumulation, batch_size = layout
    order = epoch_order(lengths, seed, 0)
    for step in range(len(order) // 12):
        parts = [
            order[
                micro_batch_slice(
                    step, micro, batch_size=batch_size, accumulation=accumulation, rank=rank, num_ranks=num_ranks
                )
            ]
            for rank in range(num_ranks)
            for micro in range(accumulation)
        ]
        assert np.array_equal(np.concatenate(parts), order[step * 12 : (step + 1) * 12])


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 6))
def test_evaluation_has_every_sample_once_and_equal_steps(num_samples, batch_size, num_ranks):
    slices = [evaluation_slices(num_samples, batch_size, rank, num_ranks) for rank in range(num_ranks)]
    assert len({part.shape for part in slices}) == 1
    seen = np.concatenate([part.reshape(-1) for part in slices])
    assert sorted(seen[seen != PADDING].tolist()) == list(range(num_samples))
