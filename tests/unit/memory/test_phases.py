"""Phases of a run, and the allocator's peaks within each, on recorded readings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolkit.memory import allocator
from toolkit.memory.allocator import PEAKS, read_device
from toolkit.memory.phases import PeakWindows, phase_of, plan_phases
from toolkit.memory.report import phase_ledgers
from toolkit.prune.schedule import Schedule


def spans(*arguments):
    return {phase.name: (phase.first, phase.last, phase.probed) for phase in plan_phases(*arguments)}


def test_phases_of_a_pruned_run():
    assert spans(100, 10, Schedule(0.7, 20, 60, 7)) == {
        "first_step": (1, 1, 1),
        "warm_up": (2, 10, 3),
        "dense": (11, 20, 12),
        "ramp": (21, 60, 27),
        "final": (61, 100, 62),
    }
    assert spans(100, 50, Schedule(0.7, 20, 60, 7))["warm_up"] == (2, 20, 3)  # the ramp ends it
    assert spans(100, 0, Schedule()) == {"first_step": (1, 1, 1), "dense": (2, 100, 3)}
    assert spans(1, 0, Schedule()) == {"first_step": (1, 1, 1)}


@given(
    st.integers(1, 60), st.integers(0, 70), st.integers(0, 50), st.integers(1, 50), st.integers(1, 30), st.booleans()
)
def test_every_step_has_one_phase_and_each_phase_one_probed_step(total, warm_up, begin, length, frequency, prunes):
    schedule = Schedule(0.5, begin, begin + length, frequency) if prunes else Schedule()
    phases = plan_phases(total, warm_up, schedule)
    steps = [step for phase in phases for step in range(phase.first, phase.last + 1)]
    assert steps == list(range(1, total + 1))
    for phase in phases:
        assert phase.first <= phase.probed <= phase.last
        assert phase_of(phases, phase.probed) is phase


RECORDED = {
    "allocated_bytes.all.current": 390 * 2**20,
    "allocated_bytes.all.peak": 10_911 * 2**20,
    "active_bytes.all.peak": 10_950 * 2**20,
    "requested_bytes.all.peak": 10_885 * 2**20,
    "reserved_bytes.all.current": 12_890 * 2**20,
    "reserved_bytes.all.peak": 12_890 * 2**20,
    "inactive_split_bytes.all.current": 77,
    "num_alloc_retries": 2,
    "num_ooms": 0,
    "something.else": 1,
}


def test_the_allocators_statistics(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: RECORDED)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 2**30, 48 * 2**30))
    reading = read_device(torch.device("cuda"))
    assert reading["allocated_peak_bytes"] == 10_911 * 2**20
    assert reading["active_peak_bytes"] == 10_950 * 2**20
    assert (reading["inactive_split_bytes"], reading["alloc_retries"], reading["ooms"]) == (77, 2, 0)
    assert reading["device_used_bytes"] == 18 * 2**30
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_ooms": 3})  # of another torch
    assert read_device(torch.device("cuda"))["reserved_bytes"] is None
    assert set(read_device(torch.device("cpu")).values()) == {None}


def windows(monkeypatch, peaks):
    resets = []
    monkeypatch.setattr("toolkit.memory.phases.reset_peaks", resets.append)
    readings = iter(peaks)
    return PeakWindows(torch.device("cuda"), lambda device: dict.fromkeys(PEAKS, next(readings))), resets


def test_peaks_by_phase_and_of_the_life(monkeypatch):
    log, resets = windows(monkeypatch, [5, 40, 90, 30, 70])
    log.enter("dense")  # build had 5
    log.enter("dense")  # not a new window
    log.enter("evaluation")  # dense had 40
    log.enter("dense")  # evaluation had 90
    assert log.close_window() == dict.fromkeys(PEAKS, 30)
    figures = log.figures()
    assert [(name, peak["allocated_peak_bytes"]) for name, peak in figures.items()] == [
        ("build", 5),
        ("dense", 70),
        ("evaluation", 90),
        ("life", 90),
    ]
    assert len(resets) == 6  # one at the start, one for each window
    resumed, _ = windows(monkeypatch, [1, 1])
    resumed.load(log.peaks)
    assert resumed.figures()["life"]["reserved_peak_bytes"] == 90


def test_without_a_gpu_every_peak_is_none():
    figures = PeakWindows(torch.device("cpu")).figures()
    assert set(figures) == {"build", "life"}
    assert {value for peaks in figures.values() for value in peaks.values()} == {None}


@pytest.mark.parametrize("workspaces", [None, 500])
@pytest.mark.parametrize("unexplained", [0, 1234])
def test_rows_and_what_lies_above_sum_to_each_level(unexplained, workspaces):
    held = unexplained + (workspaces or 0)
    peaks = {
        "allocated_peak_bytes": 1000 + held,
        "requested_peak_bytes": 900 + held,
        "active_peak_bytes": 1,
        "reserved_peak_bytes": 5000,
    }
    phase = {"step": 3, "part": "backward", "rows": {"weights": 600, "activations": 300}, "peaks": peaks}
    phase |= {} if workspaces is None else {"blas_workspaces_bytes": workspaces}  # checkpoints of before have none
    ledger = phase_ledgers(
        {"rank": 0, "device_used_peak_bytes": 7000, "phases": {"dense": phase}}, {"dense": {"weights": 600}}
    )["dense"]
    assert sum(row["measured_bytes"] for row in ledger["rows"]) == 900
    assert (ledger["rounding_bytes"], ledger["unexplained_bytes"]) == (100, unexplained)
    assert ledger["blas_workspaces_bytes"] == workspaces
    above = ledger["rounding_bytes"] + (workspaces or 0) + ledger["unexplained_bytes"]
    assert 900 + above == ledger["allocated_peak_bytes"]
    assert ledger["allocated_peak_bytes"] + ledger["allocator_cache_bytes"] == ledger["reserved_peak_bytes"]
    assert ledger["reserved_peak_bytes"] + ledger["context_and_others_bytes"] == ledger["device_used_peak_bytes"]


def test_workspaces_are_what_is_freed_with_them(monkeypatch):
    held = {"weights": 900, "workspaces": 65}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: sum(held.values()))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: held.pop("workspaces", None), raising=False)
    assert allocator.release_blas_workspaces(torch.device("cuda")) == 65
    assert allocator.release_blas_workspaces(torch.device("cuda")) == 0
    assert allocator.release_blas_workspaces(torch.device("cpu")) is None


def test_the_device_is_asked_before_its_peaks_are_reset():
    allocator.reset_peaks(torch.device("cpu"))  # without a GPU torch's own function would raise
