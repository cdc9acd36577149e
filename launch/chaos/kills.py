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

from launch.chaos.trial import PARTS, WAIT_S, State, Trial, final_state
from toolkit.progress import Progress

RESTARTS = 3


def run_undisturbed(data: Path, out: Path) -> tuple[State, float]:
    """The final state to compare with, and the seconds the run took. Raises RuntimeError where it fails."""
    trial, begin = Trial(data, out, "whole"), time.monotonic()
    if trial.run(trial.command()):
        raise RuntimeError(f"the undisturbed run failed, see {trial.log}")
    return final_state(trial.folder), time.monotonic() - begin


def _await_part(process: subprocess.Popen[bytes], trial: Trial, rank: int, part: str, occurrence: int) -> bool:
    """Wait until a rank is in `part` for the given time; False where the run ended before."""
    inside, seen = False, 0
    while process.poll() is None:
        now = trial.part_of(rank)
        seen += now == part and not inside
        if seen == occurrence:
            return True
        inside = now == part
        time.sleep(0.0005)
    return False


def _kill_once(trial: Trial, number: int, part: str, draw: random.Random) -> dict[str, Any]:
    begin, rank = time.monotonic(), draw.randrange(2)
    occurrence = {"loading": 1, "step": draw.randint(1, 60), "mask update": draw.randint(1, 12)}
    result = {"trial": number, "rank": rank, "aimed_at": part}
    with trial.running(trial.command(restarts=RESTARTS)) as process:
        ranks = trial.await_ranks(process)
        if part == "loading":
            time.sleep(draw.uniform(0.0, 8.0))
        elif not _await_part(process, trial, rank, part, occurrence.get(part, draw.randint(1, 3))):
            return {**result, "while": None, "status": process.wait(WAIT_S)}
        else:
            time.sleep(draw.uniform(0.0, 0.01))
        os.kill(ranks[rank], signal.SIGKILL)
        hit, status = trial.part_of(rank), process.wait(WAIT_S)
    return {**result, "while": hit, "status": status, "took_s": round(time.monotonic() - begin, 1)}


def run_kills(data: Path, out: Path, trials: int, seed: int, wanted: State) -> list[dict[str, Any]]:
    """`trials` killed runs, the parts taken in turn; each compared with the `wanted` final state."""
    draw, found = random.Random(seed), []
    with Progress(trials, "trials", "kills") as bar:
        for number in range(trials):
            trial = Trial(data, out, f"killed-{number}", wanted)
            found.append({**_kill_once(trial, number, PARTS[number % len(PARTS)], draw), "equal": trial.equal()})
            bar.advance(1, json.dumps(found[-1]))
    return found
