"""What goes between the ranks is what the formulas say, byte for byte, on every engine."""

import os

import pytest
from engines import ENGINES
from flags import train_flags
from ranks import run_ranks

pytest.importorskip("deepspeed")  # here, once: it takes five seconds

from launch.scaling.collectives import WHAT, count_of_run, formulas, log_line_bytes, traffic_of, wire_bytes
from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.metrics import memory_columns


def facts(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    return traffic_of(build(parse([*flags, "--experiment", f"facts-{engine}"])))


def counted(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    return count_of_run(build(parse([*flags, "--experiment", engine])))


@pytest.mark.parametrize(("model", "ranks"), [pytest.param("test_vit", 3, marks=pytest.mark.long), ("test_resnet", 2)])
def test_counted_bytes_are_those_of_the_formulas(few_digits, tmp_path, model, ranks):
    flags = train_flags(
        few_digits,
        tmp_path,
        "--model",
        model,
        "--global-batch-size",
        "12",
        "--epochs",
        "2",
        "--opt",
        "adamwprune",
        "--sparsity",
        "0.7",
        "--prune-begin",
        "0",
        "--prune-frequency",
        "5",
    )
    plain = run_ranks(facts, 2, "ddp", flags, join_group=False)[0]
    sharded = run_ranks(facts, 2, "fsdp2", flags, join_group=False)[0]
    for engine in ENGINES:
        found = run_ranks(counted, ranks, engine, flags, join_group=False)[0]
        wanted = formulas(engine, sharded if engine == "fsdp2" else plain, ranks)
        assert {what: found[what]["bytes"] for what in WHAT} == wanted, engine


def test_the_log_line():
    from toolkit.dist import World

    world = World(num_ranks=4)
    reading = dict.fromkeys(
        ("ledger", "allocated_peak_bytes", "active_peak_bytes", "reserved_peak_bytes", "device_used_bytes"), 1
    )
    assert log_line_bytes(4) == 3 * 8 + memory_columns(world, reading).nbytes


def test_ring():
    assert wire_bytes("all_reduce", 100, 2) == 100
    assert wire_bytes("all_gather", 50, 2) + wire_bytes("reduce_scatter", 100, 2) == wire_bytes("all_reduce", 100, 2)
