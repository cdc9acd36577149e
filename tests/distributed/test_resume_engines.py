"""A checkpoint of any engine goes on with any other, on any number of ranks: exact, then equal to rounding."""

import os
import signal

import pytest
import torch
from at_batch import at_batch
from engines import ENGINES, whole_states, whole_weights
from flags import vit_flags
from ranks import run_ranks
from test_engines import far

from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint
from toolkit.engine.loop import train as train_loop
from toolkit.engine.snapshot import load_snapshot
from toolkit.errors import InterruptedRunError


@pytest.fixture
def flags(few_digits, tmp_path):
    return vit_flags(few_digits, tmp_path, "--log-interval", "10", "--prune-frequency", "3", "--val-interval", "3")


def held(run):
    """Copies: on CPU the tensors are the run's own."""
    weights = {name: tensor.clone() for name, tensor in whole_weights(run.engine).items()}
    averages = {name: tensor.clone() for name, tensor in whole_weights(run.engine, run.ema.module).items()}
    return weights, {key: value.clone() for key, value in whole_states(run.engine).items()}, averages


def stop_at_11(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    run = build(parse(flags))
    if rank == 0:  # as Slurm does before it takes a job's nodes
        at_batch(run, 10, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(InterruptedRunError):
        train_loop(run)


def go_on(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    run = build(parse(flags))
    history = load_snapshot(run)
    loaded = held(run)
    position = (history.epoch, history.step)
    train_loop(run)
    return loaded, position, held(run), run.sparsity()


def whole(rank, flags):
    run = build(parse(flags))
    train_loop(run)
    return held(run), run.sparsity()


WAYS = [
    ("ddp", 2, [("ddp", 1), ("ddp", 4), ("zero1", 2), ("zero3", 2), ("fsdp2", 2)]),
    ("fsdp2", 2, [("fsdp2", 3), ("ddp", 1)]),
    ("zero1", 2, [("ddp", 1)]),
    ("zero2", 3, [("zero2", 2), ("ddp", 2)]),
    ("zero3", 2, [("zero3", 3), ("ddp", 2)]),
]


METHOD = ["--opt", "adamwprune", "--sparsity", "0.7", "--state-dtype", "float32"]
METHOD += ["--opt-eps", "1e-6", "--opt-kwargs", "implementation=reference"]
LONG = [pytest.param(*way, marks=pytest.mark.long) for way in WAYS]
SHORT = [("ddp", 2, [("fsdp2", 2), ("zero2", 2)]), ("zero3", 2, [("ddp", 1)])]


@pytest.mark.parametrize(("saved_by", "ranks", "ways"), [*SHORT, *LONG])
@pytest.mark.parametrize("method", [METHOD])
def test_any_engine_goes_on_from_any_other(flags, tmp_path, saved_by, ranks, ways, method):
    import shutil

    flags = [*flags, *method, "--model-ema", "--model-ema-decay", "0.8"]
    wanted, sparsity = run_ranks(whole, 2, [*flags, "--experiment", "whole"], join_group=False)[0]
    run_ranks(stop_at_11, ranks, saved_by, [*flags, "--experiment", "parts"], join_group=False)
    checkpoint = load_checkpoint(newest_checkpoint(tmp_path / "parts" / "checkpoints"))
    assert checkpoint["engine"] == saved_by
    for engine, count in ways:
        name = f"{engine}-{count}"
        shutil.copytree(tmp_path / "parts", tmp_path / name)
        loaded, position, final, zeros = run_ranks(
            go_on, count, engine, [*flags, "--experiment", name, "--resume", "auto"], join_group=False
        )[0]
        assert position == (1, 3)
        weights, states, averages = loaded
        for kind, tensors in (("model", weights), ("ema", averages)):
            assert checkpoint[kind].keys() == tensors.keys()
            for key, value in checkpoint[kind].items():
                assert torch.equal(tensors[key], value), (name, kind, key)
        saved = checkpoint["optimizer"]["state"]
        assert {(n, k) for n, state in saved.items() for k in state} == states.keys()
        for (parameter, key), value in states.items():
            assert torch.equal(value, saved[parameter][key]), (name, parameter, key)
        assert zeros == sparsity
        for kind in (0, 2):  # weights and their averages
            for key, value in wanted[kind].items():
                if "qkv.bias" not in key:
                    assert far(final[kind][key], value) < 1e-3, (name, key)
