"""Whole runs in this process, one rank: what the loop promises."""

import csv
import json
import math
from pathlib import Path

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
from toolkit.engine import loop
from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint
from toolkit.engine.loop import train as train_loop
from toolkit.engine.metrics import SCALARS

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


def test_timms_settings_leave_the_zeros_exact_and_are_in_the_log(flags, tmp_path):
    """Grey images that are no square, three copies of each, a rate for each layer, cycles, and a flag of no effect."""
    shape = ["--model", "test_vit", "--input-size", "1", "48", "32", "--global-batch-size", "18", "--aug-repeats", "3"]
    rates = ["--layer-decay", "0.8", "--epochs", "2", "--lr-cycle-limit", "2", "--sched-on-updates"]
    argv = [part for part in flags if part not in ("--img-size", "32")]
    argv = [*argv, *PRUNED, *shape, *rates, "--experiment", "r", "--no-prefetcher"]
    assert train.main(argv) == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert (metrics["completed"], metrics["epochs"], metrics["steps_per_epoch"]) == (True, 4, 5)
    assert metrics["final_sparsity"] == pytest.approx(0.7, abs=1e-4)
    assert "--no-prefetcher changes nothing: " in (tmp_path / "r" / "train.log").read_text()
    memory = json.loads((tmp_path / "r" / "memory.json").read_text())
    assert all(row["measured_bytes"] == row["predicted_bytes"] for row in memory["ledger"]["rows"])
    groups = final_state(tmp_path / "r")["optimizer"]["param_groups"]
    assert len({group["lr_scale"] for group in groups if group["prunable"]}) > 2


def test_rules_for_layers_are_exact_foreseen_and_in_args_yaml(flags, tmp_path):
    rules = {
        "^conv1": "skip",
        r"^layer3\.": 0.9,
        r"^layer2\.0\.conv2": {"pattern": "2:4"},
        "^fc": {"score": "magnitude"},
    }
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules, sort_keys=False))
    argv = [*flags, *PRUNED, "--prune-config", str(tmp_path / "rules.yaml"), "--experiment", "r"]
    run = make(argv)
    train_loop(run)
    zeros = {name: int((weight == 0).sum()) for name, weight in run.prunable}
    counts = {name: weight.numel() for name, weight in run.prunable}
    assert not any(name.startswith("conv1") for name in zeros)

    def share(start):
        names = [name for name in zeros if name.startswith(start)]
        return sum(zeros[name] for name in names), sum(counts[name] for name in names)

    (third, of_third), (second, of_second), (head, of_head) = map(share, ("layer3", "layer2.0.conv2", "fc"))
    rest, of_rest = sum(zeros.values()) - third - second - head, sum(counts.values()) - of_third - of_second - of_head
    assert (third, second) == (math.floor(0.9 * of_third), of_second // 2)
    assert (head, rest) == (math.floor(0.7 * of_head), math.floor(0.7 * of_rest))
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["final_sparsity"] == metrics["target_sparsity"] == sum(zeros.values()) / sum(counts.values())
    memory = json.loads((tmp_path / "r" / "memory.json").read_text())
    assert all(row["measured_bytes"] == row["predicted_bytes"] for row in memory["ledger"]["rows"])
    again = parse(["-c", str(tmp_path / "r" / "args.yaml")])
    assert list(again.prune_config.items()) == list(rules.items())


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


def test_the_last_mask_update_is_the_optimizers_where_a_scaler_leaves_steps_out(flags, monkeypatch):
    """fp16's GradScaler does not call the optimizer where a gradient is not finite; the loop counts the update."""
    run, released = make(flags, *PRUNED), []
    update = run.engine.update
    run.engine.update = lambda step, want_norm: None if step in (2, 3) else update(step, want_norm)
    monkeypatch.setattr(loop, "_release_memory", lambda run: released.append((run.pruning_steps, run.sparsity())))
    train_loop(run)
    ((step, (zeros, weights)),) = released
    assert step == run.schedule.end_step
    assert zeros == math.floor(0.7 * weights)


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


@pytest.mark.parametrize("model", [pytest.param("resnet50", marks=pytest.mark.long), "vit_tiny_patch16_224"])
def test_any_timm_model_by_name(flags, model, tmp_path):
    assert train.main([*flags, *PRUNED, "--model", model, "--epochs", "1", "--experiment", "r"]) == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert round(metrics["final_sparsity"], 4) == 0.7


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


def test_data_from_a_url_trains_like_a_folder(flags, few_digits, tmp_path, webdataset):
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


def test_slow_data_is_said_once_with_what_to_change(flags, monkeypatch, capsys):
    monkeypatch.setattr("toolkit.engine.metrics._SLOW_DATA_PERCENT", -1.0)
    assert train.main([*flags, "--epochs", "1", "--experiment", "slow"]) == 0
    said = capsys.readouterr().err
    assert said.count("of its time for data: raise --workers (now 0 a rank") == 1
