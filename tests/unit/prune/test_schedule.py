import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.prune.schedule import Schedule

schedules = st.builds(
    lambda s, begin, length, every: Schedule(s, begin, begin + length, every),
    st.floats(0.01, 0.99),
    st.integers(0, 500),
    st.integers(1, 2000),
    st.integers(1, 300),
)


@given(schedules, st.integers(1, 10**8))
def test_ends_at_floor_of_the_target(schedule, count):
    assert schedule.num_zeros_at(schedule.end_step, count) == math.floor(schedule.sparsity * count)
    assert schedule.num_zeros_at(schedule.end_step + 1000, count) == math.floor(schedule.sparsity * count)


@given(schedules)
def test_last_update_is_at_end_step_and_none_comes_after(schedule):
    due = [step for step in range(schedule.end_step + 400) if schedule.is_update_step(step)]
    assert due[-1] == schedule.end_step
    assert due[0] >= schedule.begin_step
    assert all(b - a <= schedule.frequency for a, b in itertools.pairwise(due))


@given(schedules)
def test_target_rises_and_never_overshoots(schedule):
    targets = [schedule.sparsity_at(step) for step in range(schedule.begin_step - 2, schedule.end_step + 3)]
    assert all(a <= b for a, b in itertools.pairwise(targets))
    assert targets[0] == 0.0
    assert targets[-1] == schedule.sparsity


def test_is_cubic_fast_first():
    schedule = Schedule(0.8, 100, 300, 10)
    # Zhu & Gupta, eq. 1, half way: s_f - s_f (1/2)^3
    assert schedule.sparsity_at(200) == pytest.approx(0.8 * (1 - 0.125))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0, "end_step": 5}, "must be in"),
        ({"sparsity": -0.1}, "must be in"),
        ({"sparsity": 0.5}, "needs end_step"),
        ({"sparsity": 0.5, "begin_step": 5, "end_step": 5}, "begin < end"),
        ({"sparsity": 0.5, "end_step": 5, "frequency": 0}, "at least 1"),
    ],
)
def test_refuses_what_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        Schedule(**options)


def test_off_is_never_due():
    assert not any(Schedule().is_update_step(step) for step in range(100))
