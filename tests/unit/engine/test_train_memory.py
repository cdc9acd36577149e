"""Whole runs in this process: what is watched of their memory, when, and whether it was foreseen."""

import contextlib
import json

import pytest
from test_train import PRUNED, SCHEMA_FILE, make

import train
from toolkit.engine.loop import train as train_loop
from toolkit.engine.metrics import Metrics
from toolkit.memory.allocator import read_device
from toolkit.memory.phases import phase_of, plan_phases


def test_memory_is_watched_at_the_optimizers_steps_where_a_scaler_leaves_some_out(flags, monkeypatch):
    """A phase and the target are those of the optimizer's step; a watched one that was left out is watched anew."""
    run, watched, targets = make(flags, *PRUNED, "--prune-begin", "0.3"), [], []
    phases = plan_phases(run.plan.total_steps, 0, run.schedule)
    probed = {phase.name: phase.probed for phase in phases}
    left_out = (1, 2, probed["ramp"] + 2, probed["final"] + 3)
    update, probe, write = run.engine.update, run.memory.probe, Metrics.write
    run.engine.update = lambda step, want_norm: None if step in left_out else update(step, want_norm)

    @contextlib.contextmanager
    def noted(step):
        before = run.sparsity()[0]
        with probe(step) as watching:
            yield watching
        if watching is not None:
            watched.append((run.memory.windows.phase, run.pruning_steps, before, run.sparsity()[0]))

    def written(metrics, values, step):
        targets.extend([(step, values["pruning/target_sparsity"])] if "pruning/target_sparsity" in values else [])
        write(metrics, values, step)

    run.memory.probe = noted
    monkeypatch.setattr(Metrics, "write", written)
    train_loop(run)
    made = {name: rest for name, *rest in watched}  # the last of each
    assert {name: step for name, (step, _, _) in made.items()} == probed
    assert {name: one["step"] for name, one in run.memory.phases.items()} == probed
    wanted, weights = run.sparsity()
    assert made["ramp"][1:] == [0, run.schedule.num_zeros_at(probed["ramp"], weights)]
    assert made["final"][1:] == [wanted, wanted]
    own = {step: step - sum(number <= step for number in left_out) for step in range(1, run.plan.total_steps + 1)}
    assert targets == [(step, run.schedule.sparsity_at(own[step])) for step in range(2, 19, 2)]
    for row in run.memory.timeline:
        missing = row["step"] in left_out  # its phase is that of the step it would have been
        assert row["phase"] == phase_of(phases, own[row["step"]] + missing).name


@pytest.mark.parametrize(
    ("opt", "more"),
    [
        ("adamwprune", []),
        ("adamwprune", ["--prune-start", "0.5", "--state-budget", "auto"]),
        ("adamw-magnitude", ["--prune-start", "0.6"]),
        ("adamw-movement", []),
        ("sgd", []),
        ("sgd", ["--amp", "bf16", "--channels-last"]),
        ("adamwprune", ["--model-dtype", "bfloat16"]),
        ("sgd", ["--grad-checkpointing", "--model-ema"]),
        ("sgd", ["--mixup", "0.2"]),
        ("sgd", ["--bce-loss"]),
    ],
)
def test_the_ledger_of_a_steps_peak_is_what_was_predicted(flags, tmp_path, opt, more):
    sparsity = [] if opt == "sgd" else ["--sparsity", "0.7", "--prune-begin", "0.3"]
    assert train.main([*flags, "--opt", opt, *sparsity, *more, "--experiment", "r"]) == 0
    report = json.loads((tmp_path / "r" / "memory.json").read_text())
    pruned = ["ramp", "final"] if opt != "sgd" else []
    assert list(report["phases"]) == ["first_step", "dense", *pruned]
    for name in ("first_step", "ramp"):  # nothing is predicted for them
        phase = report["phases"].pop(name, {"predicted_total_bytes": None})
        assert phase["predicted_total_bytes"] is None
    for phase in report["phases"].values():
        assert sum(row["measured_bytes"] for row in phase["rows"]) == phase["total_bytes"]
        assert phase["unexplained_bytes"] is None  # no allocator to ask on CPU
        assert not [row for row in phase["rows"] if row["difference_bytes"]]
        assert phase["total_bytes"] == phase["predicted_total_bytes"]
    jsonschema = pytest.importorskip("jsonschema", reason="not installed; requirements-dev.txt has it")
    jsonschema.validate(json.loads((tmp_path / "r" / "memory.json").read_text()), json.loads(SCHEMA_FILE.read_text()))


def test_peaks_are_read_before_a_record_begins_new_ones(flags, monkeypatch):
    order = []
    monkeypatch.setattr("toolkit.engine.metrics.read_device", lambda where: order.append("read") or read_device(where))
    run = make(flags, "--epochs", "1", "--experiment", "r")
    sample = run.memory.sample
    run.memory.sample = lambda step: order.append("sample") or sample(step)
    train_loop(run)
    assert order == ["read", "sample"] * 3
