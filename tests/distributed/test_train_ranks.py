"""The real loop on two forked ranks: equal to one rank, and together in every stop."""

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from at_batch import at_batch
from flags import vit_flags
from ranks import run_ranks

from toolkit.builder import build
from toolkit.builder.accelerator import stay_on_this_host
from toolkit.cli import parse
from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint
from toolkit.engine.loop import train as train_loop
from toolkit.errors import InterruptedRunError, MasksDifferError, NonFiniteLossError


@pytest.fixture
def flags(few_digits, tmp_path):
    return vit_flags(few_digits, tmp_path)


def _train(rank, flags, dtype, poison=None):
    torch.set_default_dtype(dtype)
    try:
        run = build(parse(flags))
        if poison is not None:
            poison(run)
        train_loop(run)
        return {
            "weights": {name: p.detach().clone() for name, p in run.engine.module.named_parameters()},
            "masks": [
                run.engine.inner_optimizer.state[p]["mask"].clone()
                for _, p in run.prunable
                if "mask" in run.engine.inner_optimizer.state[p]
            ],
            "sparsity": run.sparsity(),
        }
    finally:
        torch.set_default_dtype(torch.float32)


METHODS = {
    "adamwprune": ["--opt", "adamwprune", "--sparsity", "0.7", "--state-dtype", "float32"],
    "start": ["--opt", "adamwprune", "--sparsity", "0.9", "--prune-start", "0.6", "--state-budget", "auto"],
    "movement": ["--opt", "momentum", "--pruning", "movement", "--sparsity", "0.7"],
    "magnitude": ["--opt", "adamw", "--pruning", "magnitude", "--sparsity", "0.7", "--clip-grad", "1"],
    "none": ["--opt", "adamwspam"],
}


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("method", [*list(METHODS)[:-1], pytest.param("none", marks=pytest.mark.long)])
def test_n_ranks_equal_one(flags, tmp_path, method, ranks):
    """float64, no BatchNorm: weights within 1e-10 and the same masks."""
    one = _train(0, [*flags, *METHODS[method], "--experiment", "one"], torch.float64)
    many = run_ranks(_train, ranks, [*flags, *METHODS[method], "--experiment", "many"], torch.float64, join_group=False)
    for other in many:
        assert other["sparsity"] == one["sparsity"]
        assert len(other["masks"]) == len(one["masks"])
        assert all(torch.equal(a, b) for a, b in zip(other["masks"], one["masks"], strict=True))
        for name, weight in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, rtol=0, atol=1e-10)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "many")]
    assert (metrics[0]["world_size"], metrics[1]["world_size"]) == (1, ranks)
    assert metrics[0]["eval_top1"] == metrics[1]["eval_top1"]
    assert metrics[0]["train_loss"] == pytest.approx(metrics[1]["train_loss"], abs=1e-10)
    memory = json.loads((tmp_path / "many" / "memory.json").read_text())
    assert [entry["rank"] for entry in memory["ranks"]] == list(range(ranks))
    for row in memory["ledger"]["rows"]:
        if row["name"] != "optim.step":  # float64 here, for torch's default dtype is; float32 in real runs
            assert row["measured_bytes"] == row["predicted_bytes"], row


def _train_frozen(rank, flags):
    import toolkit.builder.predict
    import toolkit.builder.run

    original = toolkit.builder.run.create_model

    def create_frozen(*asked):
        model = original(*asked)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = not name.startswith(("conv1", "bn1", "layer1"))
        return model

    toolkit.builder.run.create_model = toolkit.builder.predict.create_model = create_frozen
    run = build(parse(flags))
    train_loop(run)
    trained = [p for p in run.engine.module.parameters() if p.requires_grad]
    return run.sparsity(), sum(p.numel() for p in trained if p.ndim > 1), sum(p.nbytes for p in trained)


@pytest.mark.parametrize("ranks", [1, 2])
def test_frozen_weights_are_neither_pruned_nor_counted(flags, tmp_path, ranks):
    method = [*METHODS["adamwprune"], "--prune-begin", "0.3"]
    more = ["--model", "test_resnet", *method, "--model-ema", "--experiment", "r"]
    (zeros, weights), prunable, trained_bytes = run_ranks(_train_frozen, ranks, [*flags, *more], join_group=False)[0]
    assert weights == prunable
    assert zeros == math.floor(0.7 * weights)
    report = json.loads((tmp_path / "r" / "memory.json").read_text())
    rows = {row["name"]: row for row in report["ledger"]["rows"]}
    for row in rows.values():
        assert row["measured_bytes"] == row["predicted_bytes"], row
    assert rows["gradients" if ranks == 1 else "ddp_buckets"]["measured_bytes"] == trained_bytes
    for phase in ("dense", "final"):
        for row in report["phases"][phase]["rows"]:
            if row["name"] not in ("input", "activations", "workspace", "gradients"):  # of a step
                assert row["difference_bytes"] == 0, (phase, row)


def _stop_at(step, rank_that_is_told):
    def poison(run):
        if run.world.rank == rank_that_is_told:
            at_batch(run, step - 1, lambda: os.kill(os.getpid(), signal.SIGTERM))

    return poison


def _interrupted(rank, flags, step):
    with pytest.raises(InterruptedRunError):
        _train(rank, flags, torch.float32, _stop_at(step, rank_that_is_told=1))


@pytest.mark.parametrize(
    ("model", "step"),
    [
        ("test_resnet", 11),
        pytest.param("test_resnet", 8, marks=pytest.mark.long),  # an epoch ends
        pytest.param("test_vit", 11, marks=pytest.mark.long),
    ],
)
def test_two_ranks_stop_together_and_resume_bit_for_bit(flags, tmp_path, model, step):
    more = [*flags, "--model", model, *METHODS["adamwprune"], "--drop", "0.1", "--model-ema"]
    run_ranks(_train, 2, [*more, "--experiment", "whole"], torch.float32, join_group=False)
    run_ranks(_interrupted, 2, [*more, "--experiment", "parts"], step, join_group=False)
    assert newest_checkpoint(tmp_path / "parts" / "checkpoints").name == f"step-{step:08d}"
    run_ranks(_train, 2, [*more, "--experiment", "parts", "--resume", "auto"], torch.float32, join_group=False)
    whole, parts = (load_checkpoint(newest_checkpoint(tmp_path / name / "checkpoints")) for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(value, parts[part][key]) for key, value in whole[part].items())
    for index, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, parts["optimizer"]["state"][index][key]) for key, value in state.items())
    assert all(torch.equal(a["cpu"], b["cpu"]) for a, b in zip(whole["random"], parts["random"], strict=True))


def _resumed_on_one(rank, flags):
    return _train(rank, flags, torch.float64)["weights"]


def test_resume_on_another_number_of_ranks(flags, tmp_path):
    more = [*flags, *METHODS["adamwprune"]]
    whole = _train(0, [*more, "--experiment", "whole"], torch.float64)["weights"]

    def stopped(rank):
        with pytest.raises(InterruptedRunError):
            _train(rank, [*more, "--experiment", "parts"], torch.float64, _stop_at(11, rank_that_is_told=0))

    run_ranks(stopped, 2, join_group=False)
    losses = json.loads((tmp_path / "whole" / "metrics.json").read_text())["train_loss"]
    (parts,) = run_ranks(_resumed_on_one, 1, [*more, "--experiment", "parts", "--resume", "auto"], join_group=False)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-10)
    resumed = json.loads((tmp_path / "parts" / "metrics.json").read_text())["train_loss"]
    assert resumed == pytest.approx(losses, abs=1e-10)


def test_a_launch_of_one_process_where_two_were_asked_for_is_noticed(flags, monkeypatch):
    """accelerate launch --cpu --num_processes 2 starts one process and says nothing; MASTER_ADDR betrays it."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="asked for several processes but started one"):
        build(parse([*flags, "--opt", "adamw"]))


def _poisoned(rank, flags):
    before = {}

    def poison(run):
        original, seen = run.to_inputs, 0

        def inputs(batch):
            nonlocal seen
            images, labels = original(batch)
            seen += 1
            if seen == 4:
                before.update({name: p.detach().clone() for name, p in run.engine.module.named_parameters()})
                before["run"] = run
                if rank == 1:
                    images[0] = float("inf")
            return images, labels

        run.to_inputs = inputs

    with pytest.raises(NonFiniteLossError, match="step 4 on rank 1"):
        _train(rank, flags, torch.float32, poison)
    run = before.pop("run")
    return all(torch.equal(p, before[name]) for name, p in run.engine.module.named_parameters())


def test_non_finite_loss_on_one_rank_stops_all_before_the_update(flags, tmp_path):
    assert run_ranks(_poisoned, 2, [*flags, *METHODS["adamwprune"], "--experiment", "r"], join_group=False) == [
        True,
        True,
    ]
    assert (tmp_path / "r" / "memory.json").exists()


@pytest.mark.parametrize(("address", "name"), [("127.0.0.1", "lo"), ("10.0.0.7", None)])
def test_ranks_of_one_host_do_not_listen_on_the_network(monkeypatch, address, name):
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    stay_on_this_host()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == name
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_processes_that_do_not_know_each_other_are_noticed(flags, monkeypatch):
    """Two copies of one rank each, both taking themselves for the main one, is what some launches silently make."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("toolkit.builder.accelerator.Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(ValueError, match="the launcher started 2 processes but Accelerate sees 1"):
        build(parse([*flags, "--opt", "adamw"]))


def _with_another_mask(rank, flags):
    run = build(parse([*flags, "--opt", "adamwprune", "--sparsity", "0.7", "--experiment", "r"]))
    original = run.engine.update

    def update(*arguments):
        original(*arguments)
        for _, mask in list(run.masked_parameters())[2:3]:
            if rank == 1:
                mask[0] ^= 1

    run.engine.update = update
    with pytest.raises(MasksDifferError, match=r"rank 1 has another mask of blocks\.\d\.attn"):
        train_loop(run)
    return True


def test_a_rank_that_prunes_other_weights_is_named(flags):
    assert run_ranks(_with_another_mask, 3, flags, join_group=False) == [True] * 3
