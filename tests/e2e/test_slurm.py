"""The job scripts under a stand-in for Slurm: `srun` starts the tasks, `scontrol` writes down what it is asked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flags import train_flags

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do
  while wait "$task"; status=$?; kill -0 "$task" 2>/dev/null; do :; done
  (( status )) && worst=$status
done
exit "${worst:-0}"
"""
SCONTROL = """#!/bin/bash
[[ $1 == show ]] && { echo 127.0.0.1; exit; }
echo "$@" >> "$SAID"
"""


@pytest.fixture
def slurm(tmp_path):
    """Starts a job script; the environment is that of a job of `nodes` nodes."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)

    def start(script, nodes, ranks, *flags):
        environment = {
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(20_000 + os.getpid()),
            "SLURM_NNODES": str(nodes),
            "SLURM_JOB_NODELIST": "here",
            "RANKS": str(ranks),
            "OMP_NUM_THREADS": "1",
            "CONFIG": "accelerate_configs/cpu.yaml",
            "LAUNCH": f"{Path(sys.executable).parent}/accelerate launch",
            "SAID": str(tmp_path / "said"),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        return subprocess.Popen(
            ["bash", f"launch/slurm/{script}", *flags],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    return start


@pytest.fixture
def flags(few_digits, tmp_path):
    pruned = ("--opt", "adamwprune", "--sparsity", "0.7", "--experiment", "r")
    return train_flags(few_digits, tmp_path / "runs", *pruned)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is the CPU run")
def test_a_warned_job_saves_queues_again_and_goes_on(slurm, flags, tmp_path):
    job = slurm("one_node.sbatch", 1, 2, *flags, "--epochs", "16", "--log-interval", "1")
    log = tmp_path / "runs" / "r" / "train.log"
    deadline = time.monotonic() + 90
    while not (log.exists() and "Train: 2" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "checkpoint saved in" in said
    assert (tmp_path / "said").read_text() == f"requeue {20_000 + os.getpid()}\n"

    (tmp_path / "said").unlink()
    wrong = slurm("one_node.sbatch", 1, 2, *flags, "--epochs", "16", "--opt", "sdg")
    said, _ = wrong.communicate(timeout=60)
    assert wrong.returncode != 0
    assert not (tmp_path / "said").exists(), "a job that fails must not queue again for ever"

    job = slurm("one_node.sbatch", 1, 2, *flags, "--epochs", "16")
    said, _ = job.communicate(timeout=150)
    assert job.returncode == 0, said
    assert "Resumed from" in said
    assert json.loads((tmp_path / "runs" / "r" / "metrics.json").read_text())["completed"] is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is the CPU run")
def test_two_nodes(slurm, flags, tmp_path):
    job = slurm("many_nodes.sbatch", 2, 1, *flags, "--epochs", "2")
    said, _ = job.communicate(timeout=150)
    assert job.returncode == 0, said
    metrics = json.loads((tmp_path / "runs" / "r" / "metrics.json").read_text())
    assert metrics["completed"] is True
    assert metrics["world_size"] == 2
    assert not (tmp_path / "said").exists()
