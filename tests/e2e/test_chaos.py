"""A bounded part of `make chaos`: two kills and three of the other faults (`test_launch.py` kills one real run)."""

import pytest

from launch.chaos.faults import run_faults
from launch.chaos.kills import run_kills, run_undisturbed
from launch.chaos.report import all_well, to_markdown


@pytest.mark.long
@pytest.mark.timeout(500)
def test_nothing_is_lost(digits, tmp_path):
    wanted, whole_s = run_undisturbed(digits, tmp_path)
    faults = ("two runs into one folder", "disk full while saving", "no permission to write")
    result = {
        "kills": run_kills(digits, tmp_path, trials=2, seed=3, wanted=wanted),
        "faults": run_faults(digits, tmp_path, wanted, faults),
        "whole_s": whole_s,
    }
    assert all_well(result), result
    assert "2 of 2 killed runs ended equal bit for bit" in to_markdown(result, "x")
