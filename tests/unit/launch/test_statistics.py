import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.report.significance import SPREAD_FLOOR, compare, mean_and_spread, rank_ranges


def test_a_difference_known_by_hand():
    # differences 1, 2, 3: mean 2, spread 1; t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3)
    found = compare({0: 11.0, 1: 12.0, 2: 13.0, 9: 50.0}, {0: 10.0, 1: 10.0, 2: 10.0})
    assert (found.mean, found.spread, found.seeds) == (2.0, 1.0, 3)
    assert found.interval[1] - found.mean == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert found.beyond_spread
    assert not found.beyond_noise
    assert str(found) == "+2.00 ± 1.00 [-0.48, +4.48]"


def test_one_seed_says_nothing():
    found = compare({0: 99.0}, {0: 1.0})
    assert found.mean == 98.0
    assert not found.beyond_noise
    assert not found.beyond_spread
    assert mean_and_spread([3.0]) == (3.0, None)
    assert rank_ranges({"a": {0: 99.0}, "b": {0: 1.0}, "c": {0: 50.0}}) == {"a": (1, 3), "b": (1, 3), "c": (1, 3)}


def test_methods_without_a_common_seed_are_an_error():
    with pytest.raises(ValueError, match="no common seed"):
        compare({0: 1.0}, {1: 1.0})


def test_clear_differences_are_ranked():
    results = {"low": {0: 1.0, 1: 1.1, 2: 1.2}, "high": {0: 9.0, 1: 9.1, 2: 9.2}, "high too": {0: 9.1, 1: 9.0, 2: 9.2}}
    assert rank_ranges(results) == {"low": (3, 3), "high": (1, 2), "high too": (1, 2)}


def test_equal_differences_of_two_seeds_are_luck():
    found = compare({0: 90.4, 1: 91.4}, {0: 90.0, 1: 91.0})
    assert found.spread == SPREAD_FLOOR
    assert not found.beyond_noise


def test_many_pairs_need_more_than_one_pair_does():
    close = {0: 90.0, 1: 90.1, 2: 90.2}
    ahead = {0: 90.5, 1: 90.9, 2: 90.8}  # differences 0.5, 0.8, 0.6: p = 0.019 alone
    assert compare(ahead, close).beyond_noise
    assert rank_ranges({"ahead": ahead, "close": close}) == {"ahead": (1, 1), "close": (2, 2)}
    others = {f"other {i}": {0: 90.0 + i, 1: 91.5 - i, 2: 90.2} for i in range(4)}
    assert rank_ranges({"ahead": ahead, "close": close, **others})["ahead"][1] > 1


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=6))
def test_comparing_the_other_way_round_mirrors(pairs):
    mine, other = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    there, back = compare(mine, other), compare(other, mine)
    assert there.mean == pytest.approx(-back.mean)
    assert there.spread == pytest.approx(back.spread)
    assert there.beyond_noise == back.beyond_noise
