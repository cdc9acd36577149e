import csv
import json

import pytest
import torch
from ranks import run_ranks

from toolkit.dist import World
from toolkit.memory.allocator import read_device, read_host
from toolkit.memory.phases import Phase
from toolkit.memory.recorder import TIMELINE_COLUMNS, MemoryLog
from toolkit.memory.report import merge_ranks, reduce_ranks, write_report, write_report_of_survivors


def test_without_an_accelerator_device_figures_are_null_not_zero():
    assert set(read_device(torch.device("cpu")).values()) == {None}
    host = read_host()
    assert 0 < host["rss_bytes"] <= host["rss_peak_bytes"]


def record(rank, weights, **changes):
    figures = {
        "rank": rank,
        "unit": "bytes",
        "device_type": "cpu",
        "num_ranks": 2,
        "ledger_end": {"weights": weights},
        "ledger_peak": {"weights": weights},
        "ledger_peak_step": 1,
        "phases": {},
        "device": {"allocated_bytes": None},
        "device_used_source": "sysfs",
        "host_name": "a",
        "device_uuid": f"gpu-{rank}",
    }
    return figures | changes


def test_reduction_over_ranks():
    reduced = reduce_ranks([record(0, 10), record(1, 30)])
    assert reduced["ledger_end.weights"] == {"min": 10, "mean": 20.0, "max": 30, "sum": 40, "argmax_rank": 1}
    assert set(reduced["device.allocated_bytes"].values()) == {None}


def test_a_device_that_two_ranks_share_is_counted_once():
    ranks = [
        record(0, 1, device_used_peak_bytes=100, device_uuid="gpu-0"),
        record(1, 1, device_used_peak_bytes=110, device_uuid="gpu-0"),
        record(2, 1, device_used_peak_bytes=50, device_uuid="gpu-1"),
        record(3, 1, device_used_peak_bytes=7, device_uuid="gpu-0", host_name="b"),
    ]
    reduced = reduce_ranks(ranks)
    assert reduced["device_used_peak_bytes"]["sum"] == 110 + 50 + 7
    assert reduced["device_used_peak_bytes"]["max"] == 110
    assert reduced["ledger_end.weights"]["sum"] == 4


@pytest.mark.parametrize(
    "change", [{"unit": "MiB"}, {"device_type": "cuda"}, {"num_ranks": 3}, {"device_used_source": "nvml"}]
)
def test_ranks_that_differ_are_not_merged(change):
    with pytest.raises(ValueError, match="ranks disagree"):
        merge_ranks([record(0, 1), record(1, 1, **change)], {}, {}, {}, torch.device("cpu"))


def _log(rank, folder):
    """A log of three steps in which rank 1 holds more."""
    held = [100, 500, 200] if rank == 1 else [10, 20, 20]
    log = MemoryLog(World.detect(torch.device("cpu")))
    log.begin(
        lambda: {
            "weights": [torch.empty(held[len(log.timeline)], dtype=torch.uint8)],
            "optim.exp_avg": [torch.empty(7, dtype=torch.uint8)],
        },
        [Phase("first_step", 1, 1, 1), Phase("dense", 2, 3, 3)],
        folder,
    )
    for step in (1, 2, 3):
        log.enter_step(step)
        log.sample(step)
    return log


def _write(rank, folder):
    log = _log(rank, folder)
    write_report(log, World.detect(torch.device("cpu")), folder, {"opt": "adamw"}, lambda rank: ({"weights": 20}, {}))
    return log.peak_step


def test_two_ranks_make_one_report(tmp_path):
    assert run_ranks(_write, 2, tmp_path) == [2, 2]
    report = json.loads((tmp_path / "memory.json").read_text())
    assert report["schema"] == "memory-report/1"
    assert report["kind"] == "host-standin"
    assert "NO GPU" in report["note"]
    assert report["device"]["gpu_measured"] is False
    assert [entry["rank"] for entry in report["ranks"]] == [0, 1]
    assert report["reduced"]["ledger_peak.weights"]["max"] == 500
    assert report["reduced"]["ledger_peak.weights"]["argmax_rank"] == 1
    assert report["reduced"]["peaks.life.allocated_peak_bytes"]["max"] is None
    assert report["ledger"]["rows"][0] == {"name": "weights", "measured_bytes": 20, "predicted_bytes": 20}
    assert report["ledger"]["total_bytes"] == 27
    assert report["ledger"]["optimizer_bytes"] == 7
    with open(tmp_path / "memory_timeline.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == TIMELINE_COLUMNS
    assert [(row["rank"], row["step"]) for row in rows] == [(r, s) for r in "01" for s in "123"]
    assert rows[0]["allocated_bytes"] == ""
    assert rows[0]["phase"] == "first_step"
    assert not (tmp_path / "memory_ranks").exists()  # all is in the report


def _survive(rank, folder):
    log = _log(rank, folder)
    world = World.detect(torch.device("cpu"))
    if rank != 1:  # rank 1 is killed here
        write_report_of_survivors(
            log, world, folder, {}, lambda rank: ({}, {}), "RuntimeError: connection reset by peer"
        )


def test_the_survivors_report_names_the_rank_that_was_lost(tmp_path):
    run_ranks(_survive, 3, tmp_path)
    report = json.loads((tmp_path / "memory.json").read_text())
    assert [entry["rank"] for entry in report["ranks"]] == [0, 2]
    (lost,) = report["lost_ranks"]
    assert (lost["rank"], lost["last_step"]) == (1, 3)
    assert lost["last_record"]["ledger_peak"]["weights"] == 500  # kept, and in no figure
    assert report["reduced"]["ledger_peak.weights"]["max"] == 20
    assert "Rank 1 was lost" in (tmp_path / "memory.md").read_text()
    with open(tmp_path / "memory_timeline.csv", newline="") as file:
        assert {row["rank"] for row in csv.DictReader(file)} == {"0", "2"}


def test_a_row_that_one_rank_lacks_is_0_there():
    ranks = [record(0, 1), record(1, 1, ledger_end={"weights": 1, "ema": 9})]
    assert reduce_ranks(ranks)["ledger_end.ema"] == {"min": 0, "mean": 4.5, "max": 9, "sum": 9, "argmax_rank": 1}
