"""A study of made-up accuracies around real run folders (results/demo), and its report."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from launch.report.__main__ import main
from launch.report.archive import read_runs, unpack

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "results"
DEMO = RESULTS / "demo" / "runs.jsonl.xz"
TOP1 = {  # label -> seed -> final top-1
    "resnet18_adamw_none": {0: 99.0, 1: 99.2, 2: 99.1},
    "resnet18_adamw_movement_70": {0: 97.0, 1: 97.2, 2: 97.1},
    "resnet18_adamwprune_state_70": {0: 99.0, 1: 99.3, 2: 99.1},
    "resnet18_momentum_movement_70": {0: 98.9, 1: 99.4, 2: 99.1},
}


@pytest.fixture
def runs(tmp_path):
    folder, cells = tmp_path / "runs", tmp_path / "demo"
    unpack(read_runs(DEMO)[0], cells)
    shutil.rmtree(cells / "resnet18_adamwprune_state_70_seed0")  # the default, with a budget
    (cells / "resnet18_adamwprune_state_70_state-dtype=float32_seed0").rename(
        cells / "resnet18_adamwprune_state_70_seed0"
    )
    for name, results in TOP1.items():
        for seed, top1 in results.items():
            cell = shutil.copytree(cells / f"{name}_seed0", folder / f"{name}_seed{seed}")
            metrics = json.loads((cell / "metrics.json").read_text())
            metrics |= {"seed": seed, "final_top1": top1, "best_top1": top1 + 0.1, "steps_per_epoch": 22}
            (cell / "metrics.json").write_text(json.dumps(metrics))
            settings = yaml.safe_load((cell / "args.yaml").read_text())
            (cell / "args.yaml").write_text(yaml.safe_dump(settings | {"seed": seed, "state_dtype": None}))
            (cell / "memory_timeline.csv").write_text(
                "rank,step,phase,ledger_bytes,optimizer_bytes,alloc_retries\n0,11,dense,1000,500,\n0,22,final,800,300,\n"
            )
    return folder


@pytest.fixture
def report(runs, tmp_path):
    out = tmp_path / "study"
    assert main([str(runs), "--out", str(out)]) == 0
    return out
