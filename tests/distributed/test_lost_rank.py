"""A rank is killed, or holds more than the others: what the one memory report says."""

import json
import os
import signal
import time

import pytest
import torch
from at_batch import at_batch
from flags import vit_flags
from ranks import exit_codes

from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.loop import train as train_loop
from toolkit.errors import LostRankError


@pytest.fixture
def flags(few_digits, tmp_path):
    return vit_flags(few_digits, tmp_path, "--opt", "adamwprune", "--sparsity", "0.7")


def _killed(rank, flags):
    run = build(parse([*flags, "--experiment", "r"]))
    if rank == 1:
        at_batch(run, 10, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(LostRankError, match=r"rank 1 \(last heard of at step 8\)"):
        train_loop(run)


def test_killing_a_rank_leaves_a_report_of_the_rest(flags, tmp_path):
    assert exit_codes(_killed, 3, flags) == [0, -signal.SIGKILL, 0]
    report = json.loads((tmp_path / "r" / "memory.json").read_text())
    assert [record["rank"] for record in report["ranks"]] == [0, 2]
    assert all("ended" in record for record in report["ranks"])
    (lost,) = report["lost_ranks"]
    assert lost["rank"] == 1
    assert lost["last_step"] == 8
    assert report["phases"]["first_step"]["total_bytes"] > 0
    assert "Rank 1 was lost" in (tmp_path / "r" / "memory.md").read_text()


def _hanging(rank, flags):
    run = build(parse([*flags, "--experiment", "r", "--dist-timeout", "4"]))
    if rank == 2:
        at_batch(run, 10, lambda: time.sleep(60))
    with pytest.raises(LostRankError, match=r"rank 2 \(last heard of at step 8\)"):
        train_loop(run)


def test_a_rank_that_hangs_is_named_when_the_time_is_up(flags):
    begin = time.monotonic()
    assert exit_codes(_hanging, 3, flags, timeout_s=25, hanging=[2]) == [0, 0, -signal.SIGKILL]  # by the test itself
    assert time.monotonic() - begin < 30


def _failing(rank, flags):
    def fail():
        raise ValueError("this very image")

    run = build(parse([*flags, "--experiment", "r", "--dist-timeout", "20"]))
    if rank == 1:
        at_batch(run, 10, fail)
    with pytest.raises(ValueError if rank == 1 else RuntimeError, match="this very image" if rank == 1 else ""):
        train_loop(run)
    if rank == 1:
        os._exit(7)


def test_a_ranks_own_error_is_not_taken_for_a_lost_rank(flags):
    assert exit_codes(_failing, 2, flags) == [0, 7]


def _heavier(rank, flags):
    run = build(parse([*flags, "--experiment", "r"]))
    if rank == 1:  # say, a second average that only this rank keeps
        owners, held = run.memory.owners, torch.zeros(1000)
        run.memory.owners = lambda: owners() | {"ema": [held]}
    train_loop(run)


def test_the_rank_that_holds_more_is_named(flags, tmp_path):
    assert exit_codes(_heavier, 2, flags) == [0, 0]
    reduced = json.loads((tmp_path / "r" / "memory.json").read_text())["reduced"]
    assert reduced["ledger_end.ema"] == {"min": 0, "mean": 2000.0, "max": 4000, "sum": 4000, "argmax_rank": 1}
    for total in ("ledger_end.total", "phases.dense.rows.total", "phases.final.rows.total"):
        if total in reduced:
            assert reduced[total]["argmax_rank"] == 1
            assert reduced[total]["max"] - reduced[total]["min"] == 4000
    assert "ledger_end.total" in reduced
