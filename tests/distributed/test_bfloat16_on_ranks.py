"""--model-dtype bfloat16 on several ranks: FSDP2 gives DDP's weights bit for bit, ZeRO says why it does not take it."""

import os

import pytest
import torch
from engines import ENGINES
from flags import train_flags, vit_flags
from ranks import run_ranks

from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.loop import train as train_loop

# Moments in float32: those in bfloat16 draw for their place among a rank's survivors.
FLAGS = ("--model-dtype", "bfloat16", "--opt", "adamwprune", "--sparsity", "0.7", "--state-dtype", "float32")


def train(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    run = build(parse(flags))
    history = train_loop(run)
    whole = run.engine.whole
    weights = {name: whole(part) for name, part in run.engine.weights()}
    own = run.engine.weights() if engine == "ddp" else ()
    return {
        "weights": weights,
        "own": dict(own),
        "masks": {name: whole(part) for name, key, part in run.engine.optimizer_states() if key == "mask"},
        "zeros": run.engine.count_zeros(run.prunable),
        "losses": history.train_loss,
        "rows": run.memory.end,
        "num_weights": run.facts["num_weights"],
    }


def refused(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    with pytest.raises(ValueError, match="--model-dtype bfloat16 is not offered with") as found:
        build(parse(flags))
    return str(found.value)


@pytest.fixture
def flags(few_digits, tmp_path):
    return vit_flags(few_digits, tmp_path, "--epochs", "2", *FLAGS)


def test_fsdp2_gives_the_weights_of_ddp_and_goes_on_from_them(flags):
    """Chances go by a weight's place in the whole parameter, also where a rank's rows begin within a group of 256."""
    wanted = run_ranks(train, 2, "ddp", [*flags, "--experiment", "ddp"], join_group=False)
    found = run_ranks(train, 2, "fsdp2", [*flags, "--experiment", "fsdp2"], join_group=False)[0]
    first, second = wanted
    assert all(torch.equal(first["own"][name], second["own"][name]) for name in first["own"])
    for kind in ("weights", "masks"):
        assert found[kind].keys() == first[kind].keys() != set()
        for name, tensor in first[kind].items():
            assert torch.equal(found[kind][name], tensor), name
    assert {tensor.dtype for tensor in found["weights"].values()} == {torch.bfloat16}
    assert found["losses"] == first["losses"]
    assert found["zeros"] == first["zeros"]
    assert found["num_weights"] == first["num_weights"] > found["zeros"][1]
    assert found["zeros"][0] == int(0.7 * found["zeros"][1])
    assert found["rows"]["weights"] == pytest.approx(first["rows"]["weights"] / 2, rel=0.05)


def test_zero_says_why_not(flags):
    pytest.importorskip("deepspeed")
    (message, _) = run_ranks(refused, 2, "zero2", flags, join_group=False)
    assert message.startswith("--model-dtype bfloat16 is not offered with deepspeed: it trains float32 copies")


def test_batchnorm_in_float32_is_for_ddp_and_not_for_fsdp2(few_digits, tmp_path):
    """fully_shard takes weights of one dtype."""
    flags = train_flags(few_digits, tmp_path, "--epochs", "2", *FLAGS)
    first, second = run_ranks(train, 2, "ddp", [*flags, "--experiment", "ddp"], join_group=False)
    norms = {name for name in first["own"] if first["own"][name].dtype is torch.float32}
    assert {"bn1.weight", "bn1.running_mean", "bn1.running_var"} <= norms
    assert "conv1.weight" not in norms
    for name, tensor in first["own"].items():
        assert "running" in name or torch.equal(tensor, second["own"][name]), name
    assert first["zeros"][0] == int(0.7 * first["zeros"][1])
    (message, _) = run_ranks(refused, 2, "fsdp2", flags, join_group=False)
    assert "fully_shard takes weights of one dtype" in message
