"""Stopping and going on, one rank: a resumed run equals one that never stopped, bit for bit."""

import csv
import json
import os
import signal

import pytest
import torch
from at_batch import at_batch
from ranks import reset_accelerate
from test_train import PRUNED, assert_same, final_state, make

import train
from toolkit.engine.checkpoint import newest_checkpoint
from toolkit.engine.loop import train as train_loop
from toolkit.errors import InterruptedRunError


def test_a_stop_in_the_middle_of_an_evaluation_is_acted_on_there(flags, tmp_path):
    """Forty batches of one image: asked for in the tenth, the run ends before the twentieth and goes on the same."""
    more = ["--opt", "adamw", "--epochs", "2", "--validation-batch-size", "1"]
    train_loop(make(flags, *more, "--experiment", "whole"))
    run = make(flags, *more, "--experiment", "parts")
    seen, original = 0, run.to_inputs

    def counting(batch):
        nonlocal seen
        seen += not run.engine.model.training
        if seen == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch)

    run.to_inputs = counting
    with pytest.raises(InterruptedRunError, match="stopped at step 6 of 12"):
        train_loop(run)
    assert seen < 20
    train_loop(make(flags, *more, "--experiment", "parts", "--resume", "auto"))
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


VARIANTS = {
    "adamwprune": PRUNED,
    "movement": ["--opt", "adamw", "--pruning", "movement", "--sparsity", "0.7"],
    "dropout, mixup, erasing, ema": [
        "--opt",
        "momentum",
        "--drop",
        "0.2",
        "--mixup",
        "0.3",
        "--cutmix",
        "1",
        "--reprob",
        "0.3",
        "--model-ema",
    ],
    "movement with ema": ["--opt", "adamw-movement", "--sparsity", "0.7", "--model-ema", "--checkpoint-interval", "4"],
    "plateau": ["--opt", "adamw", "--sched", "plateau", "--no-sched-on-updates", "--patience-epochs", "0"],
    "timm's transforms, channels last": [*PRUNED, "--color-jitter", "0.4", "--channels-last", "-j", "2"],
    "update fused into backward": [*PRUNED, "--fused-backward"],
    "magnitude, fused": ["--opt", "momentum", "--pruning", "magnitude", "--sparsity", "0.5", "--fused-backward"],
    "bfloat16 weights": [*PRUNED, "--model-dtype", "bfloat16", "--state-budget", "auto"],
    "accumulation, epoch schedule": ["--opt", "adamwadv", "--grad-accum-steps", "2", "--no-sched-on-updates"],
}


@pytest.mark.parametrize(
    ("variant", "cut"),
    [
        *((variant, 9) for variant in VARIANTS),
        *(pytest.param(variant, 6, marks=() if variant == "plateau" else pytest.mark.long) for variant in VARIANTS),
    ],
)
def test_resume_equals_not_stopping_bit_for_bit(flags, tmp_path, variant, cut):
    """Stopped after `cut` of 18 steps: at the end of the first epoch, and in the middle of the second."""
    more = VARIANTS[variant]
    train_loop(make(flags, *more, "--experiment", "whole"))
    run = make(flags, *more, "--experiment", "parts")
    stop_after(run, cut)
    with pytest.raises(InterruptedRunError, match="--resume auto"):
        train_loop(run)
    assert json.loads((tmp_path / "parts" / "metrics.json").read_text())["completed"] is False
    torch.manual_seed(999)  # whatever happened in between
    resumed = make(flags, *more, "--experiment", "parts", "--resume", "auto")
    assert resumed.resume_from.name == f"step-{cut:08d}"
    train_loop(resumed)
    assert_same(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


def stop_after(run, steps):
    """Ctrl-C while step `steps` - 1 is under way: the ranks agree on it in the next step, finish that one and save."""
    at_batch(run, (steps - 2) * run.plan.accumulation + 1, lambda: os.kill(os.getpid(), signal.SIGINT))


def test_resuming_a_finished_run_changes_nothing(flags, tmp_path):
    command = [*flags, *PRUNED, "--experiment", "r", "--epochs", "1"]
    assert train.main(command) == 0
    before = {
        path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file() and path.suffix != ".log"
    }
    assert train.main([*command, "--resume", "auto"]) == 0
    assert before == {path: path.read_bytes() for path in before}


def test_a_resumed_run_still_knows_its_dense_peak(flags, tmp_path):
    more = [*flags, *PRUNED, "--state-dtype", "float32", "--experiment", "r"]
    run = make(more)
    stop_after(run, 15)
    with pytest.raises(InterruptedRunError):
        train_loop(run)
    before = json.loads((tmp_path / "r" / "memory.json").read_text())
    train_loop(make(more, "--resume", "auto"))
    after = json.loads((tmp_path / "r" / "memory.json").read_text())
    assert after["ledger_peak"] == before["ledger_peak"]
    assert after["ledger"]["total_bytes"] < before["ledger_peak"]["total_bytes"]
    with open(tmp_path / "r" / "memory_timeline.csv", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps)
    assert steps[0] == 2
    assert steps[-1] == 18


def test_going_back_to_an_earlier_checkpoint_drops_the_later_ones(flags, tmp_path):
    more = [*flags, *PRUNED, "--experiment", "r"]
    run = make(more)
    stop_after(run, 15)
    with pytest.raises(InterruptedRunError):
        train_loop(run)
    checkpoints = tmp_path / "r" / "checkpoints"
    run = make(more, "--resume", str(checkpoints / "step-00000006"))
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000006"]
    train_loop(run)
    assert newest_checkpoint(checkpoints).name == "step-00000018"


def test_other_settings_are_refused_and_leave_the_folder_alone(flags, tmp_path, capsys):
    run = make(flags, "--opt", "adamw", "--experiment", "r")
    stop_after(run, 8)
    with pytest.raises(InterruptedRunError):
        train_loop(run)
    arguments = (tmp_path / "r" / "args.yaml").read_text()
    assert train.main([*flags, "--opt", "adamw", "--experiment", "r", "--resume", "auto", "--lr", "1"]) == 2
    assert "was made with lr=0.003, now 1.0" in capsys.readouterr().err
    assert (tmp_path / "r" / "args.yaml").read_text() == arguments
    assert train.main([*flags, "--opt", "adamw", "--resume", "auto"]) == 2
    assert "--resume auto needs --experiment" in capsys.readouterr().err


def test_resume_at_an_epochs_end_with_dropout_equals_not_stopping(flags, tmp_path):
    """What is done at an epoch's end, such as predicting memory, must not draw from the run's generator."""
    more = ["--opt", "adamw", "--drop", "0.5", "--epochs", "2", "--checkpoint-hist", "5"]
    assert train.main([*flags, *more, "--experiment", "whole"]) == 0
    reset_accelerate()
    assert train.main([*flags, *more, "--experiment", "again"]) == 0
    reset_accelerate()
    first, *_, last = sorted((tmp_path / "again" / "checkpoints").glob("step-*"))
    assert first != last
    (tmp_path / "again" / "metrics.json").unlink()
    assert train.main([*flags, *more, "--experiment", "again", "--resume", str(first)]) == 0
    assert_same(final_state(tmp_path / "whole")["model"], final_state(tmp_path / "again")["model"])


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(flags, tmp_path, capsys):
    more = ["--opt", "adamw", "--checkpoint-hist", "5"]
    assert train.main([*flags, *more, "--experiment", "whole"]) == 0
    reset_accelerate()
    assert train.main([*flags, *more, "--experiment", "r"]) == 0
    reset_accelerate()
    folder = tmp_path / "r"
    (folder / "metrics.json").unlink()  # as if it had been killed before the end
    newest = newest_checkpoint(folder / "checkpoints")
    (file,) = (newest / "tensors").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    assert train.main([*flags, *more, "--experiment", "r", "--resume", "auto"]) == 0
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert_same(final_state(tmp_path / "whole")["model"], final_state(folder)["model"])
