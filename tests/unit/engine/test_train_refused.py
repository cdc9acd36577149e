"""Runs in this process, one rank, that are refused or end early: with the reason, and before harm is done."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from ranks import reset_accelerate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import PRUNED, make

import train
from toolkit.engine.loop import train as train_loop
from toolkit.errors import NonFiniteLossError, SparsityError


def test_non_finite_loss_stops_before_the_update(flags, tmp_path):
    run = make(flags, *PRUNED, "--experiment", "r")
    original, seen, before = run.to_inputs, 0, {}

    def poisoned(batch):
        nonlocal seen
        images, labels = original(batch)
        seen += 1
        if seen == 5:
            before.update({name: p.detach().clone() for name, p in run.engine.module.named_parameters()})
            images[0, 0, 0, 0] = float("nan")
        return images, labels

    run.to_inputs = poisoned
    with pytest.raises(NonFiniteLossError, match="step 5 on rank 0"):
        train_loop(run)
    assert all(torch.equal(p, before[name]) for name, p in run.engine.module.named_parameters())
    assert (tmp_path / "r" / "memory.json").exists()


def test_a_run_that_ends_with_other_zeros_fails_loudly(flags):
    run = make(flags, *PRUNED, "--experiment", "r")
    run.prunable = run.prunable[1:]
    with pytest.raises(SparsityError, match="asks for"):
        train_loop(run)


@pytest.fixture
def with_rules(tmp_path):
    """rules:<YAML> -> a recipe with that prune_config."""

    def write(text):
        (tmp_path / "recipe.yaml").write_text(f"prune_config: {{{text.removeprefix('rules:')}}}")
        return str(tmp_path / "recipe.yaml")

    return write


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--opt", "adamwprune"], "needs --sparsity"),
        (["--opt", "adamw", "--sparsity", "0.5"], "does not prune; add --pruning"),
        (["--opt", "adamvv"], "Did you mean adam"),
        (["--opt", "lookahead_adamw", "--pruning", "movement", "--sparsity", "0.5"], "Lookahead revives"),
        (["--opt", "adamwprune", "--sparsity", "0.5", "--prune-score", "fisher"], "variance, magnitude, obd"),
        (["--opt", "adamwprune", "--sparsity", "0.5", "--opt-kwargs", "sparsity=0.2"], "set by the --prune flags"),
        ([*PRUNED, "-c", "rules:nosuch: 0.9"], "--prune-config: 'nosuch': it matches no"),
        ([*PRUNED, "-c", "rules:fc: {score: x}"], "score='x' is not known here"),
        ([*PRUNED, "-c", "rules:fc: {pattern: weight, sparsity: 2}"], "must be in [0, 1)"),
        (["-c", "rules:fc: 0.9"], "--prune-config but --opt sgd does not prune"),
        (["--opt", "adamw", "--prune-start", "0.5"], "--prune-start 0.5 but --opt adamw does not prune"),
        (["--opt", "adamwprune", "--sparsity", "0", "--prune-start", "0.5"], "--prune-start 0.5 is for single weights"),
        (["--opt", "adamwprune", "--prune-pattern", "2:4", "--prune-start", "0.3"], "--prune-start 0.3 is for single"),
        ([*PRUNED, "-c", "rules:fc: 0.3", "--prune-start", "0.4"], "--prune-start 0.4: a start at sparsity 0.4 does"),
        (["--opt", "adamw", "--opt-kwargs", "colour=1"], "does not take one of its arguments"),
        (["--model", "resnet5000"], "not a timm model; did you mean"),
        (["--train-split", "training"], "it has train, validation"),
        (["--amp", "fp16"], "use --amp bf16"),
        (["--model-dtype", "bfloat16", "--amp", "bf16"], "computed in bfloat16 anyway; leave one out"),
        (["--model-dtype", "bfloat16", "--model-ema"], "an average in bfloat16 stands still"),
        (["--global-batch-size", "1000"], "96 training samples do not fill"),
        (["--resume", "nowhere"], "not a complete checkpoint"),
        (["--mixup", "0.2", "--global-batch-size", "9"], "9 per rank is odd"),
        (["--model-kwargs", "colour=1"], "see --model-kwargs"),
        (["--model-kwargs", "drop_rate=abc"], "--model-kwargs drop_rate=abc: "),
        (["--num-classes", "5"], "check --num-classes"),
        (["--output", "/proc/x"], "--output /proc/x: No such file or directory; name a folder that can be written"),
        (["--output", f"{__file__}/x"], "/x: Not a directory; name a folder that can be written"),
        (["--initial-checkpoint", "nowhere.pth"], "does not exist"),
        (["--opt", "adamwprune", "--sparsity", "0.5", "--prune-begin", "0.01", "--prune-end", "0.02"], "too short"),
    ],
)
def test_mistakes_say_value_rule_and_remedy(flags, capsys, more, words, with_rules):
    more = [with_rules(part) if part.startswith("rules:") else part for part in more]
    assert train.main([*flags, *more]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert words in lines[0]


def test_a_folder_with_a_run_is_not_overwritten(flags, capsys):
    assert train.main([*flags, "--opt", "adamw", "--experiment", "r", "--epochs", "1"]) == 0
    assert train.main([*flags, "--opt", "adamw", "--experiment", "r", "--epochs", "1"]) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert (
        train.main([*flags, "--opt", "adamw", "--experiment", "r", "--lr", "1", "--seed", "3", "--resume", "auto"]) == 2
    )
    assert "was made with epochs=1, now 3; lr=0.003, now 1.0; seed=42, now 3; give" in capsys.readouterr().err


def test_two_runs_in_one_folder_are_refused_and_a_leftover_lock_is_no_obstacle(flags, tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / ".lock").touch()  # left over
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from toolkit.engine.lock import lock_folder;"
            "lock = lock_folder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)",
            str(folder),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(train.__file__).parent,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="is being written by another run"):
            make(flags, "--experiment", "r")
    finally:
        holder.kill()
        holder.wait()
    train_loop(make(flags, "--experiment", "r", "--epochs", "1"))
    assert json.loads((folder / "metrics.json").read_text())["completed"] is True


def test_a_run_stops_when_too_many_images_cannot_be_read(flags, few_digits, tmp_path, capsys):
    import shutil

    from toolkit.data.index import load_split

    folder = shutil.copytree(few_digits, tmp_path / "damaged")
    index = load_split(folder, "train")
    for sample in range(0, 96, 6):  # 16 of 96; 10 are allowed
        path = folder / index.names[int(index.shard[sample])]
        data = bytearray(path.read_bytes())
        data[int(index.offset[sample]) + 30] ^= 255
        path.write_bytes(bytes(data))
    damaged = [*flags, "--data-dir", str(folder), "--experiment", "damaged"]
    assert train.main(damaged) == 1
    said = capsys.readouterr().err
    assert "of 96 training images could not be read, more than 10" in said
    assert "unreadable image: number" in said
    reset_accelerate()
    few = [*flags, "--data-dir", str(folder), "--epochs", "1", "--experiment", "few", "--global-batch-size", "8"]
    for sample in range(48, 96, 6):  # mended: 8 are left
        path = folder / index.names[int(index.shard[sample])]
        data = bytearray(path.read_bytes())
        data[int(index.offset[sample]) + 30] ^= 255
        path.write_bytes(bytes(data))
    assert train.main(few) == 0
    rows = list(csv.DictReader((tmp_path / "few" / "summary.csv").open()))
    assert int(rows[0]["bad_images"]) == 8
    events = EventAccumulator(str(tmp_path / "few" / "tb")).Reload()
    assert events.Scalars("train/bad_images")[-1].value == 8


def test_the_batch_size_can_be_what_fits(flags, tmp_path, capsys):
    automatic = [flag for flag in flags if flag not in ("--global-batch-size", "16")]
    more = ["--model", "resnet10t", "--epochs", "1", "--grad-checkpointing", "--experiment", "auto"]
    more += ["--img-size", "64", "--auto-batch-size", "640MiB"]
    run = make(automatic, *more)
    assert 1 <= run.plan.global_batch_size <= 96
    args = yaml.safe_load((tmp_path / "auto" / "args.yaml").read_text())
    assert args["batch_size"] == run.plan.global_batch_size
    assert args["auto_batch_size"] == ""
    reset_accelerate()
    larger = make(automatic, *more, "--auto-batch-size", "700MiB", "--experiment", "larger")
    assert larger.plan.global_batch_size > run.plan.global_batch_size
    reset_accelerate()
    with pytest.raises(ValueError, match="one image needs"):
        make(automatic, *more, "--auto-batch-size", "100MiB", "--experiment", "none")
    reset_accelerate()
    with pytest.raises(ValueError, match="leave one out"):
        make(flags, "--auto-batch-size", "1GiB", "--experiment", "both")
