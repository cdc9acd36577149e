"""Two kills of `make chaos`'s twenty."""

import pytest

from launch.chaos import run_trials, to_markdown


@pytest.mark.timeout(400)
def test_a_killed_rank_costs_nothing_but_time(digits, tmp_path):
    result = run_trials(digits, tmp_path / "runs", trials=2, seed=3)
    killed = [trial for trial in result["trials"] if trial["killed_after_s"] is not None]
    assert killed
    assert all(trial["equal"] and trial["status"] == 0 for trial in killed), killed
    assert f"{len(killed)} of {len(killed)} killed runs ended equal bit for bit" in to_markdown(result, "x")
