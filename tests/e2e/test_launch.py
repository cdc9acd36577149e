"""The commands as people type them: three real `accelerate launch` runs of two CPU ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from ranks import run_ranks

from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint

ROOT = Path(__file__).parents[2]
CPU = ROOT / "accelerate_configs" / "cpu.yaml"
BIN = Path(sys.executable).parent


def recipe(folder, data, **more):
    settings = {
        "data_dir": str(data),
        "model": "test_resnet",
        "img_size": 32,
        "global_batch_size": 16,
        "epochs": 4,
        "lr": 3e-3,
        "warmup_epochs": 0,
        "sched_on_updates": True,
        "color_jitter": 0.0,
        "hflip": 0.0,
        "workers": 1,
        "log_interval": 3,
        "prune_frequency": 2,
        "output": str(folder / "runs"),
    } | more
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_matrix_and_report(few_digits, tmp_path):
    matrix = tmp_path / "tiny.yaml"
    cells = [{"opt": "adamwprune", "sparsity": 0.9}]
    content = {"name": "tiny", "accelerate_config": str(CPU), "recipe": str(recipe(tmp_path, few_digits))}
    matrix.write_text(yaml.safe_dump({**content, "seeds": [3], "cells": cells}))
    runs, out = tmp_path / "runs", tmp_path / "results"
    command = [sys.executable, "-m", "launch.matrix", str(matrix), "--out", str(runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "4/4 epochs (100 %)" in done.stderr
    folder = runs / "test_resnet_adamwprune_state_90_seed3"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["completed"] is True
    assert metrics["world_size"] == 2
    assert round(metrics["final_sparsity"], 4) == 0.9
    memory = json.loads((folder / "memory.json").read_text())
    assert [entry["rank"] for entry in memory["ranks"]] == [0, 1]

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)  # starts nothing
    assert again.returncode == 0
    assert "was complete" in again.stderr
    report = [sys.executable, "-m", "launch.report", str(runs), "--out", str(out)]
    done = subprocess.run(report, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "adamwprune budget auto 90 %" in done.stdout
    text = (out / "report.md").read_text()
    assert f"| 90 % | {100 * metrics['final_sparsity']:.4f} % |" in text
    assert "No figure below is GPU memory" in "\n".join(text.splitlines()[:4])
    for name in ("accuracy.png", "memory_timeline.png", "sparsity.png", "ledger.png", "summary.json"):
        assert (out / name).stat().st_size > 1000, name
    assert (out / "cells" / folder.name / "args.yaml").exists()


def undisturbed(rank, arguments):
    import train

    assert train.main(arguments) == 0


def test_a_killed_run_resumes_bit_for_bit(few_digits, tmp_path):
    config = recipe(tmp_path, few_digits, checkpoint_interval=4)
    flags = ["-c", str(config), "--opt", "adamwprune", "--sparsity", "0.7", "--resume", "auto"]
    run_ranks(undisturbed, 2, [*flags, "--experiment", "whole"], join_group=False)

    command = [
        str(BIN / "accelerate"),
        "launch",
        "--config_file",
        str(CPU),
        "train.py",
        *flags,
        "--experiment",
        "killed",
    ]
    folder = tmp_path / "runs" / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        deadline = time.monotonic() + 150
        while newest_checkpoint(folder / "checkpoints") is None:
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    time.sleep(0.5)  # the ranks die with their launcher
    at = newest_checkpoint(folder / "checkpoints").name
    assert at < "step-00000024", "the run was over before it could be killed"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"Resumed from {folder}/checkpoints/{at}" in done.stderr
    whole, killed = (
        load_checkpoint(newest_checkpoint(tmp_path / "runs" / name / "checkpoints")) for name in ("whole", "killed")
    )
    assert all(torch.equal(value, killed["model"][key]) for key, value in whole["model"].items())
    for index, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, killed["optimizer"]["state"][index][key]) for key, value in state.items())
    records = [json.loads((tmp_path / "runs" / name / "metrics.json").read_text()) for name in ("whole", "killed")]
    for key in ("train_loss", "eval_top1", "sparsity"):
        assert records[0][key] == records[1][key]
