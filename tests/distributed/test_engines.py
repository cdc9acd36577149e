"""DDP, FSDP2 and ZeRO-1, 2, 3 through Accelerate: the same masks and, to rounding, the same weights."""

import math
import os

import pytest
import torch
from engines import ENGINES, whole_states, whole_weights
from flags import vit_flags
from ranks import run_ranks

pytest.importorskip("deepspeed")  # here, once: it takes five seconds

from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.loop import train as train_loop
from toolkit.errors import NonFiniteLossError

SETTINGS = ("--epochs", "7", "--log-interval", "10", "--prune-frequency", "5", "--val-interval", "7")


@pytest.fixture
def flags(few_digits, tmp_path):
    return vit_flags(few_digits, tmp_path, *SETTINGS)


def train(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    run = build(parse(flags))
    assert run.engine.name == engine
    train_loop(run)
    return {
        "weights": whole_weights(run.engine),
        "states": whole_states(run.engine),
        "sparsity": run.sparsity(),
        "kind": type(run.engine.inner_optimizer).__name__,
        "ledger": run.memory.end,
    }


FLOAT32 = ["--state-dtype", "float32"]  # other moments are coded by each rank on its own: masks agree to rounding
METHODS = {
    "adamwprune": ["--opt", "adamwprune", "--sparsity", "0.7", *FLOAT32],
    "movement": ["--opt", "momentum", "--pruning", "movement", "--sparsity", "0.7", "--lr", "3e-2"],
    "displacement": ["--opt", "adamwspam-movement", "--prune-score", "displacement", "--sparsity", "0.5"],
    "sgdprune, regrowth": ["--opt", "sgdprune", "--sparsity", "0.7", "--prune-regrow", "0.2", "--lr", "3e-2", *FLOAT32],
    "magnitude": ["--opt", "adamw", "--pruning", "magnitude", "--sparsity", "0.7"],
    "adam-state, accumulation": ["--opt", "adam-state", "--sparsity", "0.9", "--grad-accum-steps", "2", *FLOAT32],
}


def on_every_engine(flags, more):
    return {
        engine: run_ranks(train, 2, engine, [*flags, *more, "--experiment", engine], join_group=False)[0]
        for engine in ENGINES
    }


def far(mine, wanted):
    """Distance as a share of the wanted tensor's norm."""
    return float((mine.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12))


def one_of_each_kind(names, kept):
    return [name if name in kept else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.mark.parametrize("method", one_of_each_kind(METHODS, ["sgdprune, regrowth"]))
def test_the_same_masks_on_every_engine(flags, method):
    """From the same weights, 56 steps of adamwprune and 16 of the others: every mask equal, all else to rounding."""
    epochs = [] if method == "adamwprune" else ["--epochs", "2", "--val-interval", "2"]
    found = on_every_engine(flags, [*METHODS[method], *epochs])
    wanted = found["ddp"]
    sparsity = float(METHODS[method][METHODS[method].index("--sparsity") + 1])
    for engine, one in found.items():
        assert one["kind"] == wanted["kind"], engine
        assert one["sparsity"] == wanted["sparsity"], engine
        assert one["sparsity"][0] == math.floor(sparsity * one["sparsity"][1])
        assert one["states"].keys() == wanted["states"].keys(), engine
        masks = [key for key, value in wanted["states"].items() if value.dtype is torch.bool]
        assert masks
        for key in masks:
            assert torch.equal(one["states"][key], wanted["states"][key]), (engine, key)
        # Slices begin and end elsewhere than parameters, so vectorised code rounds other elements differently.
        distances = {key: far(one["states"][key], value) for key, value in wanted["states"].items()}
        distances |= {name: far(one["weights"][name], value) for name, value in wanted["weights"].items()}
        # A key's bias does nothing in attention: its gradient is rounding, which AdamW makes steps of.
        distances = {key: value for key, value in distances.items() if "qkv.bias" not in str(key)}
        assert max(distances.values()) < 1e-3, (engine, max(distances, key=distances.get), max(distances.values()))


PATTERNS = {
    "2:4": ["--opt", "adamwprune", "--prune-pattern", "2:4", *FLOAT32],
    "channel": ["--opt", "sgdprune", "--prune-pattern", "channel", "--sparsity", "0.4", "--lr", "3e-2", *FLOAT32],
}


@pytest.mark.parametrize("pattern", one_of_each_kind(PATTERNS, []))
def test_patterns_are_alike_on_ddp_and_fsdp2_and_refused_by_zero(flags, pattern):
    short = [*PATTERNS[pattern], "--epochs", "2", "--val-interval", "2"]
    found = {
        engine: run_ranks(train, 2, engine, [*flags, *short, "--experiment", engine], join_group=False)[0]
        for engine in ("ddp", "fsdp2")
    }
    wanted, other = found["ddp"], found["fsdp2"]
    zeros, weights = wanted["sparsity"]
    assert other["sparsity"] == (zeros, weights)
    assert zeros == weights // 2 if pattern == "2:4" else 0.35 * weights < zeros <= 0.4 * weights
    masks = [key for key, value in wanted["states"].items() if value.dtype is torch.bool]
    assert masks
    for key in masks:
        assert torch.equal(other["states"][key], wanted["states"][key]), key
    with pytest.raises(AssertionError, match=f"--prune-pattern {pattern} is not offered with deepspeed"):
        run_ranks(train, 2, "zero2", [*flags, *short, "--experiment", "zero2"], join_group=False)


@pytest.fixture(scope="module")
def clipped(few_digits, tmp_path_factory):
    """One epoch of AdamW with clipped gradients, by engine."""
    flags = vit_flags(few_digits, tmp_path_factory.mktemp("clipped"), *SETTINGS)
    return on_every_engine(flags, ["--opt", "adamw", "--clip-grad", "1", "--epochs", "1", "--val-interval", "1"])


def test_clipping_is_the_same_on_every_engine(clipped):
    """Norms are summed in another order, and AdamW makes much of little: few steps, and rounding only."""
    for engine, one in clipped.items():
        for name, weight in clipped["ddp"]["weights"].items():
            torch.testing.assert_close(one["weights"][name], weight, rtol=1e-3, atol=1e-4, msg=f"{engine} {name}")


def test_the_ledger_counts_what_each_rank_holds(clipped):
    """Sharded engines keep half of the moments a rank at two ranks, and ZeRO-1 and 2 a float32 copy of the slice."""
    found = {engine: one["ledger"] for engine, one in clipped.items()}
    whole = found["ddp"]["weights"]
    assert found["ddp"]["optim.exp_avg"] == whole
    for engine in ("fsdp2", "zero1", "zero2", "zero3"):
        assert found[engine]["optim.exp_avg"] == pytest.approx(whole / 2, rel=0.02), engine
    assert found["fsdp2"]["weights"] == pytest.approx(whole / 2, rel=0.02)
    assert found["zero1"]["weights"] == pytest.approx(whole, rel=0.02)
    for engine in ("zero1", "zero2", "zero3"):
        assert found[engine]["flat_copies"] == pytest.approx(whole / 2, rel=0.02), engine


def train_offloaded(rank, stage, flags):
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu"
    ENGINES[stage].pop("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE")
    return train(rank, stage, flags)


@pytest.mark.parametrize("stage", one_of_each_kind(["zero1", "zero2", "zero3"], ["zero2"]))
def test_offloading_keeps_our_optimizer(flags, stage):
    flags = [*flags, *METHODS["adamwprune"], "--epochs", "2"]
    plain = run_ranks(train, 2, stage, [*flags, "--experiment", "plain"], join_group=False)[0]
    offloaded = run_ranks(train_offloaded, 2, stage, [*flags, "--experiment", "offloaded"], join_group=False)[0]
    assert offloaded["kind"] == "AdamWPrune"
    assert offloaded["sparsity"] == plain["sparsity"]
    assert all(torch.equal(value, plain["weights"][name]) for name, value in offloaded["weights"].items())


def poisoned(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    run = build(parse(flags))
    original, seen, before = run.to_inputs, 0, {}

    def inputs(batch):
        nonlocal seen
        images, labels = original(batch)
        seen += 1
        if seen == 4:
            before.update({name: weight.clone() for name, weight in whole_weights(run.engine).items()})
            if rank == 1:
                images[0] = float("inf")
        return images, labels

    run.to_inputs = inputs
    with pytest.raises(NonFiniteLossError, match="step 4 on rank 1"):
        train_loop(run)
    return all(torch.equal(weight, before[name]) for name, weight in whole_weights(run.engine).items())


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
def test_no_engine_makes_an_update_of_a_loss_that_is_not_finite(flags, engine):
    more = ["--opt", "adamwprune", "--sparsity", "0.7", "--experiment", "r"]
    assert run_ranks(poisoned, 2, engine, [*flags, *more], join_group=False) == [True, True]
