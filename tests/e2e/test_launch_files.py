"""Every file in accelerate_configs/ is started as it is; only the number of ranks is this machine's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from flags import train_flags

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
KINDS = ("fsdp2", "deepspeed_zero3")  # the others are long; all other tests here start by cpu.yaml
RANKS = {"one_gpu": 1, "multi_node": 1}
PRUNED = ("--epochs", "2", "--opt", "adamwprune", "--sparsity", "0.7", "--experiment", "r")
ENGINE = {"fsdp2": "fsdp2", "deepspeed_zero1": "zero1", "deepspeed_zero2": "zero2", "deepspeed_zero3": "zero3"}


def launch(file, data, out, *more, ranks=None):
    count = RANKS.get(file.stem, 2) if ranks is None else ranks
    hosts = ["--num_machines", "1"] if file.stem == "multi_node" else []  # two hosts: in network namespaces
    if "distributed_type: DEEPSPEED" in file.read_text():
        pytest.importorskip("deepspeed")
    command = [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        "--config_file",
        str(file),
        "--num_processes",
        str(count),
        *hosts,
        "train.py",
        *train_flags(data, out, *PRUNED, *more),
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)


def test_all_are_there():
    assert {file.stem for file in FILES} == {
        "cpu",
        "one_gpu",
        "multi_gpu",
        "multi_node",
        "fsdp2",
        "deepspeed_zero1",
        "deepspeed_zero2",
        "deepspeed_zero3",
    }
    for file in FILES:
        assert yaml.safe_load(file.read_text())["mixed_precision"] == "no"
        for line in file.read_text().splitlines():  # each key is explained
            assert "#" in line or line.rstrip().endswith("_config:"), (file.name, line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="these are the CPU runs")
@pytest.mark.parametrize(
    "file", [pytest.param(file, id=file.stem, marks=() if file.stem in KINDS else pytest.mark.long) for file in FILES]
)
def test_each_starts_on_this_machine(file, few_digits, tmp_path):
    done = launch(file, few_digits, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["completed"] is True
    assert metrics["world_size"] == RANKS.get(file.stem, 2)
    assert round(metrics["final_sparsity"], 4) == 0.7
    checkpoint = max((tmp_path / "r" / "checkpoints").glob("step-*")) / "state.pt"
    assert torch.load(checkpoint, weights_only=True)["engine"] == ENGINE.get(file.stem, "ddp")


@pytest.mark.parametrize(
    ("key", "value", "flags"),
    [
        ("mixed_precision", "bf16", []),
        pytest.param("gradient_clipping", 0.5, ["--clip-grad", "1"], marks=pytest.mark.long),
        pytest.param("gradient_accumulation_steps", 4, ["--grad-accum-steps", "2"], marks=pytest.mark.long),
    ],
)
def test_a_file_that_says_otherwise_than_the_flags_is_refused(few_digits, tmp_path, key, value, flags):
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "deepspeed_zero1.yaml").read_text())
    (settings if key == "mixed_precision" else settings["deepspeed_config"])[key] = value
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(settings))
    done = launch(file, few_digits, tmp_path, *flags, ranks=1)
    assert done.returncode != 0
    assert f"the launch file says {key}: {value}" in done.stderr
    assert "leave" in done.stderr
