"""A rank that is killed while the ranks join costs the others seconds, not --dist-timeout."""

import os
import subprocess
import time

from test_launch import BIN, CPU, ROOT

# Rank 1 dies at its first start, when rank 0 has been waiting for it in torch's own code for a second. Once both have
# been started again they join, and say so.
JOIN = """
import os, signal, sys, time
import torch.distributed

def dying(*arguments, **options):
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments, **options)

original = torch.distributed.init_process_group
torch.distributed.init_process_group = torch.distributed.distributed_c10d.init_process_group = dying
from toolkit.builder.accelerator import create_accelerator
from toolkit.cli import parse

accelerator = create_accelerator(parse(sys.argv[1:]))
line = f"joined {os.environ['TORCHELASTIC_RESTART_COUNT']} {accelerator.num_processes}\\n"
os.write(1, line.encode())  # one write a line: two ranks' prints came out interleaved
torch.distributed.destroy_process_group()
"""


def test_a_rank_killed_while_it_joins_costs_seconds(tmp_path):
    script = tmp_path / "join.py"
    script.write_text(JOIN)
    launch = [BIN / "accelerate", "launch", "--max_restarts", "1", "--config_file", CPU]
    begin = time.monotonic()
    done = subprocess.run(
        [*launch, script, "--data-dir", "x", "--dist-timeout", "600"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("joined 1 2") == 2
    assert time.monotonic() - begin < 120  # two starts of two ranks; the wait alone would be 600 s
