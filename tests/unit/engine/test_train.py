"""Whole runs in this process, one rank: what the loop promises."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from ranks import reset_accelerate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import toolkit.memory
import train
from toolkit.builder import build
from toolkit.cli import parse
from toolkit.config import Config
from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint
from toolkit.engine.loop import train as train_loop
from toolkit.engine.metrics import SCALARS
from toolkit.errors import NonFiniteLossError, SparsityError
from toolkit.memory.allocator import read_device

SCHEMA_FILE = Path(toolkit.memory.__file__).parent / "report_schema.json"


PRUNED = ["--opt", "adamwprune", "--sparsity", "0.7"]


def make(flags, *more):
    return build(parse([*flags, *more]))


def final_state(folder):
    return load_checkpoint(newest_checkpoint(folder / "checkpoints"))


def assert_same(a, b):
    assert type(a) is type(b)
    if torch.is_tensor(a):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key not in ("epoch_s", "images_per_sec", "seconds_so_far", "train_seconds_so_far", "memory"):
                assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_a_run_leaves_what_the_design_says(flags, tmp_path):
    assert train.main([*flags, *PRUNED, "--experiment", "r", "--model-ema", "--clip-grad", "1"]) == 0
    folder = tmp_path / "r"
    assert {path.name for path in folder.iterdir()} == {
        "args.yaml",
        "summary.csv",
        "metrics.json",
        "memory.json",
        "memory.md",
        "memory_timeline.csv",
        "tb",
        "checkpoints",
        "train.log",
        ".lock",
    }
    metrics = json.loads((folder / "metrics.json").read_text())
    for key in ("train_loss", "eval_loss", "eval_top1", "eval_top5", "sparsity", "epoch_s"):
        assert len(metrics[key]) == 3
    assert metrics["completed"] is True
    assert metrics["final_top1"] == metrics["eval_top1"][-1]
    assert metrics["best_top1"] == max(metrics["eval_top1"])
    assert (metrics["opt"], metrics["pruning"], metrics["world_size"]) == ("adamwprune", "state", 1)
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][:6] == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert len(rows) == 4
    assert yaml.safe_load((folder / "args.yaml").read_text())["opt"] == "adamwprune"
    memory = json.loads((folder / "memory.json").read_text())
    for row in memory["ledger"]["rows"]:
        assert row["measured_bytes"] == row["predicted_bytes"], row
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    elsewhere = {tag for tag in SCALARS if tag.startswith("memory/")} - {"memory/rss(MiB)", "memory/ledger_total(MiB)"}
    assert tags >= SCALARS - elsewhere  # of a GPU, or of several ranks
    assert not tags & elsewhere
    assert "memory/ledger/optim.exp_avg(MiB)" in tags
    assert events.Scalars("pruning/sparsity")[-1].value == pytest.approx(0.7, abs=1e-4)
    assert events.Scalars("eval/top1")[-1].step == 18
    assert set(events.PluginTagToContent("hparams")) >= {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert b"adamwprune" in events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_final_zeros_are_exact_in_weights_and_in_their_average(flags, tmp_path):
    run = make(flags, *PRUNED, "--experiment", "r", "--model-ema")
    train_loop(run)
    zeros, weights = run.sparsity()
    assert zeros == math.floor(0.7 * weights)
    averaged = dict(run.ema.module.named_parameters())
    for name, parameter in run.prunable:
        assert torch.equal(averaged[name] == 0, parameter == 0)
    saved = final_state(tmp_path / "r")["ema"]
    assert all(torch.equal(saved[name] == 0, parameter == 0) for name, parameter in run.prunable)


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


def test_accumulation_equals_a_larger_batch(flags, tmp_path):
    """In float64 on a model without BatchNorm: the same update from 16 images at once or 4 × 4."""
    finals = []
    torch.set_default_dtype(torch.float64)
    try:
        for steps in (1, 4):
            more = ["--model", "test_vit", "--grad-accum-steps", str(steps), "--experiment", str(steps), *PRUNED]
            train_loop(make(flags, *more))
            finals.append(final_state(tmp_path / str(steps))["model"])
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][key], rtol=0, atol=1e-10)


def test_evaluation_counts_unreadable_images_out(flags, few_digits, tmp_path):
    import shutil

    from toolkit.data.index import load_split
    from toolkit.engine.evaluate import evaluate

    folder = shutil.copytree(few_digits, tmp_path / "damaged")
    index = load_split(folder, "validation")
    with open(folder / index.names[0], "r+b") as file:
        file.seek(index.offset[0])
        file.write(b"\0" * 100)
    run = make(flags, "--data-dir", str(folder), "--experiment", "r", "--opt", "adamw")
    result = evaluate(run, run.engine.module)
    assert (result.num_samples, result.num_bad) == (39, 1)


@pytest.mark.parametrize("model", ["resnet50", "vit_tiny_patch16_224"])
def test_any_timm_model_by_name(flags, model, tmp_path):
    assert train.main([*flags, *PRUNED, "--model", model, "--epochs", "1", "--experiment", "r"]) == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert round(metrics["final_sparsity"], 4) == 0.7


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--opt", "adamwprune"], "needs --sparsity"),
        (["--opt", "adamw", "--sparsity", "0.5"], "does not prune; add --pruning"),
        (["--opt", "adamvv"], "Did you mean adam"),
        (["--opt", "lookahead_adamw", "--pruning", "movement", "--sparsity", "0.5"], "Lookahead revives"),
        (["--opt", "adamwprune", "--sparsity", "0.5", "--prune-score", "fisher"], "variance, magnitude, obd"),
        (["--opt", "adamwprune", "--sparsity", "0.5", "--opt-kwargs", "sparsity=0.2"], "set by the --prune flags"),
        (["--opt", "adamw", "--opt-kwargs", "colour=1"], "does not take one of its arguments"),
        (["--model", "resnet5000"], "not a timm model; did you mean"),
        (["--train-split", "training"], "it has train, validation"),
        (["--amp", "fp16"], "use --amp bf16"),
        (["--global-batch-size", "1000"], "96 training samples do not fill"),
        (["--resume", "nowhere"], "not a complete checkpoint"),
        (["--mixup", "0.2", "--global-batch-size", "9"], "9 per rank is odd"),
        (["--model-kwargs", "colour=1"], "see --model-kwargs"),
        (["--num-classes", "5"], "check --num-classes"),
        (["--initial-checkpoint", "nowhere.pth"], "does not exist"),
        (["--opt", "adamwprune", "--sparsity", "0.5", "--prune-begin", "0.01", "--prune-end", "0.02"], "too short"),
    ],
)
def test_mistakes_say_value_rule_and_remedy(flags, capsys, more, words):
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
    assert "was made with epochs=1, now 3" in capsys.readouterr().err


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


def test_schedules_without_state_of_their_own(flags):
    assert train.main([*flags, "--opt", "adamw", "--sched", "none", "--experiment", "none", "--epochs", "1"]) == 0


def test_weights_come_from_a_file_at_another_input_size(flags, tmp_path):
    assert train.main([*flags, "--opt", "adamw", "--model", "test_vit", "--epochs", "1", "--experiment", "a"]) == 0
    source = newest_checkpoint(tmp_path / "a" / "checkpoints")
    more = ["--opt", "adamw", "--model", "test_vit", "--initial-checkpoint", str(source)]
    run = make(flags, *more, "--experiment", "b")
    saved = final_state(tmp_path / "a")["model"]
    assert all(torch.equal(value, saved[key]) for key, value in run.engine.module.state_dict().items())


def test_amp_and_compile_run_on_cpu(flags, tmp_path):
    assert train.main([*flags, *PRUNED, "--amp", "bf16", "--epochs", "1", "--experiment", "amp"]) == 0
    reset_accelerate()
    assert train.main([*flags, *PRUNED, "--torchcompile", "eager", "--epochs", "1", "--experiment", "eager"]) == 0


def test_recipe_of_an_optimizer_gives_way_to_flags(flags):
    assert make(flags, "--opt", "adamwadv", "--experiment", "a").engine.clip_grad == 1.0
    assert make(flags, "--opt", "adamwadv", "--clip-grad", "3", "--experiment", "b").engine.clip_grad == 3.0
    assert make(flags, "--opt", "adamw", "--experiment", "c").engine.clip_grad is None


def test_sparsity_0_equals_no_pruning_bit_for_bit(flags, tmp_path):
    off = ["--opt", "adamwprune", "--sparsity", "0", "--opt-kwargs", "implementation=reference"]
    plain = ["--opt", "adamw", "--opt-kwargs", "foreach=False"]
    for name, more in {"off": off, "plain": plain}.items():
        assert train.main([*flags, *more, "--experiment", name]) == 0
    assert_same(final_state(tmp_path / "off")["model"], final_state(tmp_path / "plain")["model"])


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


def test_data_from_a_url_trains_like_a_folder(flags, few_digits, tmp_path):
    local = [*flags, "--epochs", "1", "--experiment", "local", "--shuffle-window", "2"]
    assert train.main(local) == 0
    reset_accelerate()
    url = [
        *local,
        "--experiment",
        "url",
        "--data-dir",
        f"pipe:cat {few_digits}/{{}}",
        "--shard-cache",
        str(tmp_path / "c"),
    ]
    assert train.main(url) == 0
    assert_same(final_state(tmp_path / "local")["model"], final_state(tmp_path / "url")["model"])
    reset_accelerate()
    with pytest.raises(ValueError, match="--shuffle-window -1"):
        Config(shuffle_window=-1)


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


@pytest.mark.parametrize("opt", ["adamwprune", "adamw-movement", "sgd"])
def test_the_ledger_of_a_steps_peak_is_what_was_predicted(flags, tmp_path, opt):
    sparsity = [] if opt == "sgd" else ["--sparsity", "0.7", "--prune-begin", "0.3"]
    assert train.main([*flags, "--opt", opt, *sparsity, "--experiment", "r", "--smoothing", "0"]) == 0
    report = json.loads((tmp_path / "r" / "memory.json").read_text())
    pruned = ["ramp", "final"] if opt != "sgd" else []
    assert list(report["phases"]) == ["first_step", "dense", *pruned]
    jsonschema.validate(report, json.loads(SCHEMA_FILE.read_text()))
    for name in ("first_step", "ramp"):  # nothing is predicted for them
        phase = report["phases"].pop(name, {"predicted_total_bytes": None})
        assert phase["predicted_total_bytes"] is None
    for phase in report["phases"].values():
        rows = {row["name"]: row for row in phase["rows"]}
        assert sum(row["measured_bytes"] for row in phase["rows"]) == phase["total_bytes"]
        assert phase["unexplained_bytes"] is None  # no allocator to ask on CPU
        for name in (
            "weights",
            "buffers",
            "gradients",
            "input",
            "optim.exp_avg",
            "optim.momentum_buffer",
            "masks",
            "scores",
        ):
            if name in rows:
                assert rows[name]["difference_bytes"] == 0, rows[name]
        assert rows["activations"]["measured_bytes"] == pytest.approx(rows["activations"]["predicted_bytes"], rel=0.02)
        assert phase["total_bytes"] == pytest.approx(phase["predicted_total_bytes"], rel=0.03)


def test_slow_data_is_said_once_with_what_to_change(flags, monkeypatch, capsys):
    monkeypatch.setattr("toolkit.engine.metrics._SLOW_DATA_PERCENT", -1.0)
    assert train.main([*flags, "--epochs", "1", "--experiment", "slow"]) == 0
    said = capsys.readouterr().err
    assert said.count("of its time for data: raise --workers (now 0 a rank") == 1


def test_peaks_are_read_before_a_record_begins_new_ones(flags, monkeypatch):
    order = []
    monkeypatch.setattr("toolkit.engine.metrics.read_device", lambda where: order.append("read") or read_device(where))
    run = make(flags, "--epochs", "1", "--experiment", "r")
    sample = run.memory.sample
    run.memory.sample = lambda step: order.append("sample") or sample(step)
    train_loop(run)
    assert order == ["read", "sample"] * 3
