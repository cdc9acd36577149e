import json

import pytest
import yaml

from launch.estimate import main


def test_each_kind_is_timed_once(few_digits, tmp_path, capsys):
    recipe = {
        "data_dir": str(few_digits),
        "model": "test_resnet",
        "img_size": 32,
        "global_batch_size": 16,
        "epochs": 5,
        "val_interval": 2,
        "lr": 3e-3,
        "warmup_epochs": 0,
        "color_jitter": 0.0,
        "workers": 0,
        "prune_frequency": 2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    content = {
        "name": "m",
        "recipe": str(tmp_path / "recipe.yaml"),
        "seeds": [0, 1, 2],
        "cells": [{"opt": "adamw"}, {"opt": "adamwprune", "sparsity": 0.7, "state_dtype": "float32"}],
    }
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
    assert main([str(tmp_path / "m.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    dense, pruned = found["kinds"]
    assert (dense["kind"], dense["runs"]) == ("test_resnet_adamw_none", 3)
    assert (dense["steps"], dense["evaluations"], dense["evaluated_images"]) == (30, 3, 40)
    assert dense["run_s"] == pytest.approx(30 * dense["step_s"] + 3 * dense["evaluation_s"])
    assert found["total_s"] == pytest.approx(3 * (dense["run_s"] + pruned["run_s"]))
    assert pruned["predicted_peak_bytes"]["final"] < pruned["predicted_peak_bytes"]["dense"]
    assert main([str(tmp_path / "m.yaml"), "--seeds", "0"]) == 0
    assert "in all about" in capsys.readouterr().out
