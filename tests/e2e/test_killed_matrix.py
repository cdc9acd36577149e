"""A matrix is killed in the middle of a run; called again it comes to the same accuracies, sparsities and bytes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def figures(runs):
    found = {}
    for cell in sorted(runs.glob("*/metrics.json")):
        metrics, memory = json.loads(cell.read_text()), json.loads((cell.parent / "memory.json").read_text())
        assert metrics["completed"] is True
        found[cell.parent.name] = (
            metrics["eval_top1"],
            metrics["train_loss"],
            metrics["sparsity"],
            memory["ledger"],
            memory["ledger_peak"],
        )
    return found


@pytest.mark.long
def test_killed_and_continued(few_digits, tmp_path):
    recipe = {
        "data_dir": str(few_digits),
        "model": "test_resnet",
        "img_size": 32,
        "global_batch_size": 16,
        "epochs": 6,
        "lr": 3e-3,
        "warmup_epochs": 0,
        "sched_on_updates": True,
        "color_jitter": 0.0,
        "workers": 0,
        "prune_frequency": 5,
        "log_interval": 6,
        "checkpoint_hist": 2,
        "checkpoint_interval": 4,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    content = {
        "name": "m",
        "recipe": str(tmp_path / "recipe.yaml"),
        "seeds": [0],
        "cells": [{"opt": "adamwprune", "sparsity": 0.9}, {"opt": "momentum"}],
    }
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))

    def command(name):
        return [
            sys.executable,
            "-m",
            "launch.matrix",
            str(tmp_path / "m.yaml"),
            "--jobs",
            "2",
            "--out",
            str(tmp_path / name),
        ]

    subprocess.run(command("whole"), cwd=ROOT, check=True, capture_output=True, timeout=200)
    killed = subprocess.Popen(command("killed"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cell = tmp_path / "killed" / "test_resnet_adamwprune_state_90_seed0"
    deadline = time.monotonic() + 120
    while len(list((cell / "checkpoints").glob("step-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "test_resnet_adamwprune_state_90_seed0" / "memory.json").exists()
    done = subprocess.run(command("killed"), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert "Resum" in (cell / "console.log").read_text()
