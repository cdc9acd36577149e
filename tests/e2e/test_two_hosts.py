"""Two hosts, as two network namespaces joined by a cable of their own, each with its own launcher."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch
from flags import train_flags

ROOT = Path(__file__).parents[2]
PRUNED = ("--epochs", "2", "--opt", "adamwprune", "--sparsity", "0.7", "--experiment", "r")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments):
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Names of the namespaces; the interface is called `wire` in both."""
    tag = uuid.uuid4().hex[:6]
    names = [f"host{number}-{tag}" for number in (0, 1)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", f"a{tag}", "type", "veth", "peer", "name", f"b{tag}")
            for end, name, address in zip((f"a{tag}", f"b{tag}"), names, ADDRESSES, strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "link", "set", end, "name", "wire")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
                for link in ("wire", "lo"):
                    ip("-n", name, "link", "set", link, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no right to make network namespaces: {getattr(error, 'stderr', '') or error}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is the CPU run")
@pytest.mark.long
def test_two_hosts_train_together(hosts, few_digits, tmp_path):
    processes = []
    for number, host in enumerate(hosts):
        command = [
            "ip",
            "netns",
            "exec",
            host,
            str(Path(sys.executable).parent / "accelerate"),
            "launch",
            "--config_file",
            str(ROOT / "accelerate_configs" / "multi_node.yaml"),
            "--machine_rank",
            str(number),
            "--num_processes",
            "2",
            "--main_process_ip",
            ADDRESSES[0],
            "--main_process_port",
            "29511",
            str(ROOT / "train.py"),
            *train_flags(few_digits, tmp_path, *PRUNED),
        ]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    said = [process.communicate(timeout=200)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["completed"] is True
    assert metrics["world_size"] == 2
    assert round(metrics["final_sparsity"], 4) == 0.7
