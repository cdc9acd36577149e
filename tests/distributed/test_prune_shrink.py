"""--prune-shrink: the run goes on with what is left, as the whole model would have, on one rank and on several."""

import os
import signal
from pathlib import Path

import pytest
import torch
from at_batch import at_batch
from flags import train_flags, vit_flags
from ranks import run_ranks

from launch.export import export
from launch.run_model import run_model
from launch.shrinking import to_text
from toolkit import train as command
from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.checkpoint import load_checkpoint, load_state, newest_checkpoint
from toolkit.engine.history import is_complete
from toolkit.engine.loop import train as train_loop
from toolkit.engine.metrics import Metrics
from toolkit.errors import InterruptedRunError, ModelShrunkError
from toolkit.files import read_json
from toolkit.shrink import both_cuts, cut_tensor, load_shrunk

CHANNEL = ["--prune-pattern", "channel", "--sparsity", "0.4", "--prune-begin", "0", "--val-interval", "3"]
MODELS = {"test_vit": vit_flags, "test_resnet": train_flags}
OPTIMIZERS = {
    "adamwprune": ["--opt", "adamwprune"],
    "movement": ["--opt", "momentum", "--pruning", "movement", "--lr", "3e-2"],
}


def whole_run(rank, flags):
    command._train_to_the_end(parse(flags))


def last(folder):
    return load_checkpoint(newest_checkpoint(Path(folder) / "checkpoints"))


def assert_same(smaller, whole):
    """The smaller run's weights and moments are those of the whole one in the places that are left."""
    layers = smaller["smaller"]["layers"]
    assert layers
    assert whole["smaller"] is None
    for name, tensor in smaller["model"].items():
        wanted = cut_tensor(layers, name, whole["model"][name])
        # Sums over channels are in another order without those that are 0.
        torch.testing.assert_close(tensor, wanted, rtol=2e-3, atol=2e-4)
    for name, state in smaller["optimizer"]["state"].items():
        assert "mask" not in state
        for key, value in state.items():
            wanted = cut_tensor(layers, name, whole["optimizer"]["state"][name][key])
            assert value.shape == wanted.shape, (name, key)


@pytest.mark.parametrize(
    ("num_ranks", "model", "opt"),
    [
        (2, "test_vit", "adamwprune"),
        pytest.param(1, "test_resnet", "movement", marks=pytest.mark.long),
        pytest.param(1, "test_vit", "adamwprune", marks=pytest.mark.long),
        pytest.param(2, "test_resnet", "movement", marks=pytest.mark.long),
    ],
)
def test_the_smaller_model_trains_on_as_the_whole_one_would_have(few_digits, tmp_path, model, opt, num_ranks):
    flags = MODELS[model](few_digits, tmp_path, *CHANNEL, *OPTIMIZERS[opt])
    run_ranks(whole_run, num_ranks, [*flags, "--experiment", "whole"], join_group=False)
    run_ranks(whole_run, num_ranks, [*flags, "--prune-shrink", "--experiment", "small"], join_group=False)
    small, whole = last(tmp_path / "small"), last(tmp_path / "whole")
    assert_same(small, whole)
    assert sum(t.numel() for t in small["model"].values()) < 0.8 * sum(t.numel() for t in whole["model"].values())
    found, wanted = (read_json(tmp_path / name / "metrics.json") for name in ("small", "whole"))
    assert found["completed"]
    assert found["sparsity"] == wanted["sparsity"]
    assert found["target_sparsity"] == wanted["target_sparsity"] == 0.4
    assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-3)
    peaks = {name: read_json(tmp_path / name / "memory.json")["phases"]["final"] for name in ("small", "whole")}
    assert peaks["small"]["total_bytes"] < peaks["whole"]["total_bytes"]
    assert peaks["small"]["predicted_total_bytes"] is None
    assert peaks["whole"]["predicted_total_bytes"]


def run_to(flags, batch=None):
    """Until the model shrinks or the run ends; with `batch` it is stopped there. Returns how it ended."""
    run = build(parse(flags))
    if batch is not None:
        at_batch(run, batch, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    try:
        train_loop(run)
    except (ModelShrunkError, InterruptedRunError) as end:
        return type(end), run
    return None, run


# Where an epoch ends, and within one.
@pytest.mark.parametrize("end", ["0.667", pytest.param("0.5", marks=pytest.mark.long)])
def test_a_run_that_stops_on_either_side_of_the_moment_goes_on(few_digits, tmp_path, monkeypatch, end):
    targets, write = [], Metrics.write

    def written(metrics, values, step):
        targets.append(values.get("pruning/target_sparsity"))
        write(metrics, values, step)

    monkeypatch.setattr(Metrics, "write", written)
    flags = train_flags(few_digits, tmp_path, *CHANNEL, "--opt", "adamwprune", "--prune-end", end, "--prune-shrink")
    command._train_to_the_end(parse([*flags, "--experiment", "at once"]))
    assert [target for target in targets if target is not None][-1] == 0.4
    parts = [*flags, "--experiment", "in parts", "--resume", "auto"]
    why, run = run_to(parts, batch=3)
    assert why is InterruptedRunError
    assert load_state(newest_checkpoint(run.folder / "checkpoints"))["smaller"] is None
    shrunk_at = run.schedule.end_step
    why, run = run_to(parts)
    assert why is ModelShrunkError
    assert newest_checkpoint(run.folder / "checkpoints").name == f"step-{shrunk_at:08d}"
    why, run = run_to(parts, batch=2)  # of the smaller model's own
    assert why is InterruptedRunError
    assert not run.schedule.enabled
    why, run = run_to(parts)
    assert why is None
    assert is_complete(run.folder)
    once, parts = last(tmp_path / "at once"), last(tmp_path / "in parts")
    for name, tensor in once["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name
    for name, state in once["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, parts["optimizer"]["state"][name][key]), (name, key)


@pytest.mark.long
def test_the_average_shrinks_too(few_digits, tmp_path):
    flags = train_flags(few_digits, tmp_path, *CHANNEL, "--opt", "sgdprune", "--model-ema", "--prune-shrink")
    command._train_to_the_end(parse([*flags, "--experiment", "small"]))
    state = last(tmp_path / "small")
    assert {name: tensor.shape for name, tensor in state["ema"].items()} == {
        name: tensor.shape for name, tensor in state["model"].items()
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--opt", "adamwprune", "--sparsity", "0.5"], "--prune-shrink removes whole channels; add --prune-pattern"),
        (["--opt", "adamw", "--prune-pattern", "channel"], "does not prune"),
    ],
)
def test_what_cannot_shrink_is_refused(few_digits, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        build(parse(train_flags(few_digits, tmp_path, *flags, "--prune-shrink")))


def test_a_plan_of_another_model_in_a_checkpoint_is_refused(few_digits, tmp_path):
    """A checkpoint may be a stranger's."""
    flags = train_flags(few_digits, tmp_path, *CHANNEL, "--opt", "adamwprune", "--prune-shrink", "--experiment", "a")
    why, run = run_to(flags)
    assert why is ModelShrunkError
    file = newest_checkpoint(run.folder / "checkpoints") / "state.pt"
    state = torch.load(file, weights_only=True)
    for bad in ({"nothing": {"out": [0], "in": None}}, {"conv1.0": {"out": [10**6], "in": None}}, {"fc": 3}, [1]):
        state["smaller"]["layers"] = bad
        torch.save(state, file)
        with pytest.raises(ValueError, match=r"step-\d+ says of a smaller model"):
            build(parse([*flags, "--resume", str(file.parent)]))


def test_a_shrunk_run_is_exported_by_its_plan(few_digits, tmp_path):
    flags = train_flags(few_digits, tmp_path, *CHANNEL, "--opt", "adamwprune", "--prune-shrink", "--experiment", "a")
    command._train_to_the_end(parse(flags))
    run, out = tmp_path / "a", tmp_path / "out"
    with pytest.raises(ValueError, match=r"has gone on with a smaller model.*add --shrink"):
        export(run, tmp_path / "model.safetensors")
    done = export(run, out, shrink=True)
    assert done["difference"] < 1e-5
    cut = len(last(run)["smaller"]["layers"])
    assert to_text(done).startswith(f"training has cut {cut} layers already (--prune-shrink)")
    model, state = load_shrunk(out), last(run)["model"]
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    images = torch.randn(3, 3, 32, 32)
    whole, _, layers = run_model(newest_checkpoint(run / "checkpoints"), state)
    assert layers
    torch.testing.assert_close(model(images), whole(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has gone on with a smaller model"):
        build(parse(train_flags(few_digits, tmp_path, "--initial-checkpoint", str(run), "--experiment", "b")))


def test_two_cuts_are_one():
    first = {"a": {"out": [0, 2, 5], "in": None}, "b": {"out": None, "in": [1, 3, 4]}}
    second = {"a": {"out": [1, 2], "in": [0]}, "c": {"out": [7], "in": None}}
    assert both_cuts(first, second) == {
        "a": {"out": [2, 5], "in": [0]},
        "b": {"out": None, "in": [1, 3, 4]},
        "c": {"out": [7], "in": None},
    }


def test_a_step_left_out_at_the_last_mask_update_shrinks_nothing_yet(few_digits, tmp_path):
    """As a GradScaler leaves out a step whose gradients are not finite."""
    flags = train_flags(few_digits, tmp_path, *CHANNEL, "--opt", "adamwprune", "--prune-shrink", "--experiment", "a")
    run = build(parse([*flags, "--prune-frequency", "100"]))
    optimizer, end = run.engine.inner_optimizer, run.schedule.end_step
    original, calls = optimizer.step, []

    def step(*args, **kwargs):
        calls.append(None)
        return None if len(calls) == end else original(*args, **kwargs)

    optimizer.step = step
    with pytest.raises(ModelShrunkError):
        train_loop(run)
    assert newest_checkpoint(run.folder / "checkpoints").name == f"step-{end + 1:08d}"
    saved = load_state(newest_checkpoint(run.folder / "checkpoints"))["smaller"]
    zeros, weights = run.sparsity()
    assert 0 < zeros == saved["removed_weights"] < weights


def test_a_shrunk_checkpoint_goes_on_by_its_path_elsewhere(few_digits, tmp_path):
    widths = ["--prune-scope", "layer", "--prune-channel-multiple", "4"]
    flags = train_flags(few_digits, tmp_path, *CHANNEL, *widths, "--opt", "adamwprune", "--prune-shrink")
    why, run = run_to([*flags, "--experiment", "a"])
    assert why is ModelShrunkError
    checkpoint = newest_checkpoint(run.folder / "checkpoints")
    for more in (["--experiment", "b"], []):
        why, run = run_to([*flags, *more, "--resume", str(checkpoint)])
        assert why is None
        assert run.smaller is not None
        assert is_complete(run.folder)


def test_the_off_switch_shrinks_nothing(few_digits, tmp_path):
    off = ["--prune-pattern", "channel", "--sparsity", "0", "--opt", "adamwprune", "--prune-shrink"]
    off += ["--prune-channel-multiple", "4"]
    why, run = run_to(train_flags(few_digits, tmp_path, *off, "--experiment", "a"))
    assert why is None
    assert run.smaller is None


@pytest.mark.long
def test_a_budget_stays_as_many_bytes(few_digits, tmp_path):
    budget = ["--opt", "adamwprune", "--prune-shrink", "--state-budget", "6", "--experiment", "a"]
    flags = train_flags(few_digits, tmp_path, *CHANNEL, *budget)
    why, run = run_to(flags)
    assert why is ModelShrunkError
    limit = run.engine.inner_optimizer._store.budget.limit_bytes
    why, run = run_to([*flags, "--resume", "auto"])
    assert why is None
    assert abs(run.engine.inner_optimizer._store.budget.limit_bytes - limit) <= 1
    assert {state["exp_avg"].dtype for state in run.engine.optimizer_state.values()} == {torch.float32}


@pytest.mark.long
def test_a_start_with_zeros_is_pruned_on_by_channels(few_digits, tmp_path):
    flags = train_flags(few_digits, tmp_path, *CHANNEL, "--opt", "adamwprune")
    run_to([*flags, "--experiment", "a"])
    start = ["--initial-checkpoint", str(tmp_path / "a"), "--experiment"]
    for name, more in (("sparser", ["--sparsity", "0.5"]), ("denser", ["--sparsity", "0.2"])):
        why, run = run_to([*flags, *start, name, *more])
        assert why is None
        assert is_complete(run.folder)
