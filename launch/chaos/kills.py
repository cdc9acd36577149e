"""SIGKILL for a random rank of a real run, aimed in turn at each part of its work; then it is restarted and compared.

The launcher's `--max_restarts` starts the ranks again, `--resume auto` goes on, and weights, buffers, moments and masks
of the last checkpoint must equal those of the undisturbed run bit for bit.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from launch.chaos.traced_train import PARTS, ROOT, final_state, launch_command, part_of, quiet_environment, ranks_of
from toolkit.progress import Progress

__all__ = ["RESTARTS", "run_kills", "run_undisturbed"]

RESTARTS = 3
_WAIT_S = 600


def run_undisturbed(data: Path, out: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The final state to compare with, and the seconds the run took."""
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    subprocess.run(
        launch_command(data, out, "whole"),
        check=True,
        capture_output=True,
        cwd=ROOT,
        env=quiet_environment(out / "whole.part"),
    )
    return final_state(out / "whole"), time.monotonic() - begin


def _await_part(process: subprocess.Popen[bytes], parts: Path, rank: int, part: str, occurrence: int) -> bool:
    """Wait until a rank is in `part` for the given time; False where the run ended before."""
    inside, seen = False, 0
    while process.poll() is None:
        now = part_of(parts, rank)
        if now == part and not inside:
            seen += 1
            if seen == occurrence:
                return True
        inside = now == part
        time.sleep(0.0005)
    return False


def _kill_once(data: Path, out: Path, number: int, part: str, draw: random.Random) -> dict[str, Any]:
    name, begin, rank = f"killed-{number}", time.monotonic(), draw.randrange(2)
    parts = out / f"{name}.part"
    occurrence = {"loading": 1, "step": draw.randint(1, 60), "mask update": draw.randint(1, 12)}
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            launch_command(data, out, name, restarts=RESTARTS),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=quiet_environment(parts),
        )
        ranks: dict[int, int] = {}
        while len(ranks) < 2 and process.poll() is None:
            time.sleep(0.05)
            ranks = ranks_of(process.pid)
        if part == "loading":
            time.sleep(draw.uniform(0.0, 8.0))
        elif not _await_part(process, parts, rank, part, occurrence.get(part, draw.randint(1, 3))):
            return {"trial": number, "rank": rank, "aimed_at": part, "while": None, "status": process.wait(_WAIT_S)}
        else:
            time.sleep(draw.uniform(0.0, 0.01))
        os.kill(ranks[rank], signal.SIGKILL)
        hit = part_of(parts, rank)
        status = process.wait(_WAIT_S)
    return {
        "trial": number,
        "rank": rank,
        "aimed_at": part,
        "while": hit,
        "status": status,
        "took_s": round(time.monotonic() - begin, 1),
    }


def run_kills(data: Path, out: Path, trials: int, seed: int, wanted: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """`trials` killed runs, the parts taken in turn; each compared with the `wanted` final state."""
    draw, found = random.Random(seed), []
    bar = Progress(trials, "trials", "kills")
    for number in range(trials):
        trial = _kill_once(data, out, number, PARTS[number % len(PARTS)], draw)
        mine = final_state(out / f"killed-{number}")
        trial["equal"] = mine.keys() == wanted.keys() and all(torch.equal(mine[key], wanted[key]) for key in wanted)
        found.append(trial)
        bar.advance(1, json.dumps(trial))
    bar.close()
    return found
