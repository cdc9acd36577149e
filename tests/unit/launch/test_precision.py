"""The report's section on the moments' precision: made-up accuracies and zeros around a real run folder."""

import json
import lzma
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from launch.report.__main__ import main
from launch.report.archive import read_runs, unpack
from toolkit.dist import World
from toolkit.engine.checkpoint import save_checkpoint

DEMO = Path(__file__).parents[3] / "results" / "demo" / "runs.jsonl.xz"
FLOAT32, INT8, AUTO = {"state_dtype": "float32"}, {"state_dtype": "int8"}, {"state_budget": "auto"}
HALF = AUTO | {"model_dtype": "bfloat16"}  # without --amp, where the others have it
# sparsity, settings -> of seed 0, 1: final top-1 and the zeros among eight prunable weights
RUNS = [
    (0.75, FLOAT32, (80.0, 81.0), ("01111110", "11111100")),
    (0.75, INT8, (79.9, 81.1), ("01111110", "10111101")),
    (0.75, AUTO, (80.4, 81.4), ("11111100", "11111001")),
    (0.75, HALF, (80.2, 81.2), ("01111110", "11111100")),
    (0.5, FLOAT32, (82.0, 83.0), ("00001111", "11110000")),
    (0.5, INT8, (82.3, 83.5), ("00001111", "11110000")),
]


def save_weights(cell, zeros):
    """A last checkpoint with these zeros in two prunable weights, and one in a bias that is not prunable."""
    kept = torch.tensor([zero == "0" for zero in zeros])
    tensors = {"model.b": torch.zeros(2)}
    for name, mask in (("a", kept[:4].view(2, 2)), ("c", kept[4:])):
        tensors |= {f"model.{name}": mask.float(), f"optimizer.mask.{name}": mask}
    state = {"model": {}, "optimizer": {"state": {"b": {}}}}
    save_checkpoint(
        cell / "checkpoints", state, 8, world=World(0, 1, torch.device("cpu")), history=1, tensors=tensors.items()
    )


@pytest.fixture
def runs(tmp_path):
    unpack(read_runs(DEMO)[0], tmp_path / "demo")
    for sparsity, settings, results, zeros in RUNS:
        for seed in (0, 1):
            name = f"{sparsity}-{'-'.join(settings.values())}-{seed}"
            cell = shutil.copytree(tmp_path / "demo" / "resnet18_adamwprune_state_70_seed0", tmp_path / "runs" / name)
            about = {"seed": seed, "target_sparsity": sparsity, "final_top1": results[seed]}
            metrics = json.loads((cell / "metrics.json").read_text()) | about
            (cell / "metrics.json").write_text(json.dumps(metrics))
            given = yaml.safe_load((cell / "args.yaml").read_text()) | {"seed": seed, "sparsity": sparsity}
            given |= {"amp": None if settings is HALF else "bf16"} | settings
            (cell / "args.yaml").write_text(yaml.safe_dump(given))
            save_weights(cell, zeros[seed])
    return tmp_path / "runs"


def table_of(report):
    """The section's rows: name -> the other cells."""
    text = report.read_text()
    section = text[text.index("## Precision of moments and weights") : text.index("Final epoch, paired by seed")]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {name: rest for name, *rest in rows[2:]}


def test_differences_and_agreement_known_by_hand(runs, tmp_path):
    out = tmp_path / "study.md"
    assert main([str(runs), "--out", str(out)]) == 0
    rows = table_of(out)
    t_1, t_3 = 12.706204736174698, 3.1824463052837078  # of 95 %, with 1 and 3 degrees of freedom
    # −0.1 and +0.1: spread 0.1·√2, the interval's half t·spread/√2
    low, high = -0.1 * t_1, 0.1 * t_1
    seventy_five = ["2", f"+0.00 ± 0.14 [{low:+.2f}, {high:+.2f}]", "no"]
    # 8 of 8 and 6 of 8; the two float32 seeds agree on 6 of 8; 0.75² + 0.25²
    assert rows["adamwprune int8 75 %"] == [*seventy_five, "", "87.50 %", "75.00 %", "62.50 %"]
    # equal to the image: the spread is taken as 0.05, its half t·0.05/√2; 6 of 8 both times
    half = 0.05 * t_1 / math.sqrt(2)
    assert rows["adamwprune budget auto 75 %"] == [
        "2",
        f"+0.40 ± 0.05 [{0.4 - half:+.2f}, {0.4 + half:+.2f}]",
        "yes",
        "",
        "75.00 %",
        "75.00 %",
        "62.50 %",
    ]
    assert rows["adamwprune budget auto bfloat16 weights 75 %"][1].startswith("+0.20 ± 0.05 ")
    assert rows["adamwprune int8 50 %"][4:] == ["100.00 %", "0.00 %", "50.00 %"]
    # −0.1, 0.1, 0.3, 0.5: mean 0.2, squares of what is left 0.09 + 0.01 + 0.01 + 0.09 over 3, half t·spread/√4
    spread = math.sqrt(0.2 / 3)
    half = t_3 * spread / 2
    pooled = f"+0.20 ± {spread:.2f} [{0.2 - half:+.2f}, {0.2 + half:+.2f}]"
    assert 0.2 - half > -0.3
    # By seed: −0.1 and 0.3 are 0.1, 0.1 and 0.5 are 0.3.
    by_seed = f"+0.20 ± 0.14 [{0.2 - 0.1 * t_1:+.2f}, {0.2 + 0.1 * t_1:+.2f}]"
    assert rows["**all adamwprune int8**"][:4] == ["4", pooled, "yes", by_seed]
    assert "**all adamwprune budget auto**" not in rows  # of one row there is nothing to pool
    # and 0.4, 0.4 of the budget; rows with bfloat16 weights stay out
    mean, t_5 = (0.2 * 4 + 0.4 * 2) / 6, 2.5705818356363146
    spread = math.sqrt(sum((one - mean) ** 2 for one in (-0.1, 0.1, 0.3, 0.5, 0.4, 0.4)) / 5)
    half = t_5 * spread / math.sqrt(6)
    every = f"{mean:+.2f} ± {spread:.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    assert rows["**all adamwprune**"][:3] == ["6", every, "yes"]
    assert list(rows)[-2:] == ["**all adamwprune int8**", "**all adamwprune**"]


def test_the_archive_tells_the_same_without_checkpoints(runs, tmp_path):
    first, again = tmp_path / "first" / "study", tmp_path / "again" / "study"
    assert main([str(runs), "--out", str(first)]) == 0
    assert main([str(first / "runs.jsonl.xz"), "--out", str(again)]) == 0
    assert main([str(first / "cells"), "--out", str(tmp_path / "third" / "study.md")]) == 0
    assert table_of(again / "report.md") == table_of(first / "report.md") == table_of(tmp_path / "third" / "study.md")
    archives = [lzma.decompress((out / "runs.jsonl.xz").read_bytes()) for out in (first, again)]
    assert archives[0] == archives[1]
    assert "Precision of moments and weights</h2>" in (first / "report.html").read_text()


def test_a_run_whose_checkpoint_is_gone_leaves_its_cells_empty(runs, tmp_path):
    for seed in (0, 1):
        shutil.rmtree(runs / f"0.75-int8-{seed}" / "checkpoints")
    shutil.rmtree(runs / "0.5-float32-0" / "checkpoints")
    out = tmp_path / "study.md"
    assert main([str(runs), "--out", str(out)]) == 0
    rows = table_of(out)
    assert rows["adamwprune int8 75 %"][4:] == ["–", "75.00 %", "62.50 %"]
    assert rows["adamwprune int8 50 %"][4:] == ["100.00 %", "–", "50.00 %"]  # of seed 1 alone


def test_one_precision_or_one_seed_is_no_comparison(runs, tmp_path):
    for folder in runs.iterdir():
        if "float32" not in folder.name and folder.name != "0.75-auto-1":
            shutil.rmtree(folder)
    assert main([str(runs), "--out", str(tmp_path / "study.md")]) == 0
    assert "adamwprune budget auto 75 %" in (tmp_path / "study.md").read_text()
    assert "Precision of moments and weights" not in (tmp_path / "study.md").read_text()


def test_bytes_a_weight_of_bfloat16_weights_count_weights(runs):
    found = {run.folder.name: run for run in read_runs(runs)[0]}
    plain, half = (found[f"0.75-{name}-0"] for name in ("auto", "auto-bfloat16"))
    assert half.weights == 2 * plain.weights  # the same ledger, read as two bytes each
