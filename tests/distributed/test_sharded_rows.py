"""The memory ledger of each rank of FSDP2 and ZeRO is, to the byte, what arithmetic says of its share."""

import itertools
import json
import os

import pytest
from engines import ENGINES
from flags import train_flags
from ranks import run_ranks

pytest.importorskip("deepspeed")

from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.loop import train as train_loop

BUCKET_BYTES = 4 * 500_000_000  # DeepSpeed's own choice


def train(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    run = build(parse(flags))
    assert run.engine.name == engine
    train_loop(run)
    predicted, peaks = run.predict_memory(rank)
    assert not peaks
    assert run.predict_memory(1 - rank) == ({}, {})  # its masks are not here
    phases = {name: phase["rows"] for name, phase in run.memory.phases.items()}
    return {"measured": run.memory.end, "predicted": predicted, "phases": phases}


def rows_of(engine, output, data, *more, ranks=2):
    short = ["--epochs", "1", "--model-ema", "--experiment", "r"]
    found = run_ranks(train, ranks, engine, train_flags(data, output, *short, *more), join_group=False)
    for one in found:
        assert {row: one["predicted"].get(row) for row in one["measured"]} == one["measured"]
        assert {row for row, size in one["predicted"].items() if size} <= one["measured"].keys()
    report = json.loads((output / "r" / "memory.json").read_text())["ledger"]
    assert {row["name"]: row["measured_bytes"] for row in report["rows"]} == found[0]["measured"]
    assert all(row["measured_bytes"] == row["predicted_bytes"] for row in report["rows"])
    return found


FLOAT32 = ["--state-dtype", "float32"]
METHODS = {"adamw": ["--opt", "adamw"], "adamwprune": ["--opt", "adamwprune", "--sparsity", "0.7", *FLOAT32]}
QUICK = [("fsdp2", "adamwprune"), ("zero3", "adamwprune")]  # ZeRO-1 and AdamW are below
ALL = [
    case if case in QUICK else pytest.param(*case, marks=pytest.mark.long)
    for case in itertools.product(("fsdp2", "zero1", "zero2", "zero3"), METHODS)
]


@pytest.mark.parametrize(("engine", "method"), ALL)
def test_rows_of_a_share_are_those_measured(few_digits, tmp_path, engine, method):
    """And gradients stand where the engine keeps them: FSDP2 its rows, ZeRO-3 a buffer, ZeRO-1 and 2 nothing."""
    for one in rows_of(engine, tmp_path, few_digits, *METHODS[method]):
        rows = one["measured"]
        assert ("masks" in rows) == (method == "adamwprune")
        assert rows["ddp_buckets"] == 0
        assert rows["gradients"] == {"fsdp2": rows["weights"], "zero3": rows.get("flat_copies")}.get(engine, 0)
        if engine != "fsdp2":
            assert rows["zero_buckets"] == (BUCKET_BYTES if engine == "zero3" else 0)
            assert all(phase["zero_buckets"] == BUCKET_BYTES for phase in one["phases"].values())


OTHERS = {
    "budget": ["--opt", "adamwprune", "--sparsity", "0.7", "--state-budget", "auto"],
    "start": ["--opt", "adamwprune", "--sparsity", "0.9", "--prune-start", "0.5", "--state-budget", "auto"],
    "int8": ["--opt", "adamwprune", "--sparsity", "0.7", "--state-dtype", "int8"],
    "scores": ["--opt", "adamw-movement", "--sparsity", "0.7", "--grad-accum-steps", "2"],
}


@pytest.mark.long
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("method", OTHERS)
def test_rows_of_other_states_are_those_measured(few_digits, tmp_path, engine, method):
    rows_of(engine, tmp_path, few_digits, *OTHERS[method])


@pytest.mark.long
@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero3"])
def test_rows_of_a_model_that_three_ranks_cannot_share_evenly(few_digits, tmp_path, engine):
    """And ZeRO-3 keeps no large parameter whole: resnet10t has some above its threshold of 100,000 weights."""
    more = ["--model", "resnet10t", "--global-batch-size", "12"]
    rows_of(engine, tmp_path, few_digits, *METHODS["adamwprune"], *more, ranks=3)


def test_whole_gradients_are_named_at_a_steps_peak(few_digits, tmp_path):
    """ZeRO-1 lets go of them, and of its bucket, within the step."""
    more = ["--model", "test_vit", "--global-batch-size", "12"]
    ranks = rows_of("zero1", tmp_path, few_digits, *METHODS["adamw"], *more)
    phases = [phase for one in ranks for phase in one["phases"].values()]
    for one in ranks:
        assert one["measured"]["gradients"] == one["measured"]["zero_buckets"] == 0
    for phase in phases:  # a peak may fall into the sum over the ranks: some are let go of, what is sent is workspace
        assert phase["gradients"] <= phase["weights"] < phase["gradients"] + phase["workspace"] + 32, phase
        assert phase["zero_buckets"] == BUCKET_BYTES
    assert any(phase["weights"] - phase["gradients"] < 32 for phase in phases)  # two groups, padded to 4 weights each
