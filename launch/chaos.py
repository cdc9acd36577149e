"""`python -m launch.chaos`: kill a random rank of a real run at random moments, and see whether anything is lost.

Each trial is a run of two CPU ranks under `accelerate launch --max_restarts`, one of which gets SIGKILL at a random
moment of its life (loading, step, mask update, evaluation, in the middle of a checkpoint). The launcher starts the
ranks again, `--resume auto` goes on, and the final weights must equal those of the undisturbed run bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint
from toolkit.progress import Progress

__all__ = ["main", "run_trials"]

_ROOT = Path(__file__).parent.parent
_RESTARTS = 3  # one failure may take two: the first restart can meet the old rendezvous


def _command(data: Path, out: Path, name: str) -> list[str]:
    return [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
        str(_ROOT / "accelerate_configs" / "cpu.yaml"), "--max_restarts", str(_RESTARTS), "--monitor_interval", "1",
        str(_ROOT / "train.py"), "--data-dir", str(data), "--model", "test_resnet", "--img-size", "32",
        "--global-batch-size", "64", "--epochs", "4", "--lr", "3e-3", "--warmup-epochs", "0", "--sched-on-updates",
        "--color-jitter", "0", "-j", "1", "--opt", "adamwprune", "--sparsity", "0.7", "--prune-frequency", "3",
        "--checkpoint-interval", "5", "--dist-timeout", "120", "--output", str(out), "--experiment", name,
        "--resume", "auto",
    ]  # fmt: skip


def _ranks_of(launcher: int) -> dict[int, int]:
    """rank -> process number of the training processes below a launcher."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                facts = dict(part.split("=", 1) for part in (entry / "environ").read_text().split("\0") if "=" in part)
                if "RANK" in facts:
                    found[int(facts["RANK"])] = int(entry.name)
        except (OSError, ValueError, IndexError):
            continue
    return found


def _where(folder: Path) -> str:
    """What the run was doing, by its log and folders, in a word or two."""
    if any((folder / "checkpoints").glob("tmp-*")):
        return "mid-checkpoint"
    try:
        lines = (folder / "train.log").read_text().splitlines()
    except OSError:
        return "start"
    said = [line for line in lines if "Train:" in line or "Test:" in line]
    if not said:
        return "loading, first steps"
    return "step or evaluation" if "Train:" in said[-1] else "step"


def _final(folder: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    state = load_checkpoint(newest)
    return {
        **state["model"],
        **{f"{name}.{key}": value for name, kept in state["optimizer"]["state"].items() for key, value in kept.items()},
    }


def _trial(data: Path, out: Path, number: int, moment_s: float, victim: int) -> dict[str, Any]:
    name, begin = f"killed-{number}", time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            _command(data, out, name), stdout=log, stderr=subprocess.STDOUT, cwd=_ROOT, env=environment
        )
        ranks: dict[int, int] = {}
        while len(ranks) < 2 and process.poll() is None:
            time.sleep(0.05)
            ranks = _ranks_of(process.pid)
        time.sleep(moment_s)
        where = _where(out / name)
        if process.poll() is not None or victim not in ranks:
            return {"trial": number, "killed_after_s": None, "note": "the run had ended", "rank": victim}
        os.kill(ranks[victim], signal.SIGKILL)
        status = process.wait(600)
    return {"trial": number, "rank": victim, "killed_after_s": round(moment_s, 2), "while": where, "status": status,
            "took_s": round(time.monotonic() - begin, 1)}  # fmt: skip


def run_trials(data: Path, out: Path, trials: int, seed: int) -> dict[str, Any]:
    """The undisturbed run, then `trials` killed ones."""
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    begin = time.monotonic()
    subprocess.run(_command(data, out, "whole"), check=True, capture_output=True, cwd=_ROOT, env=environment)
    whole_s, wanted = time.monotonic() - begin, _final(out / "whole")
    draw, found = random.Random(seed), []
    bar = Progress(trials, "trials", "chaos")
    for number in range(trials):
        trial = _trial(data, out, number, draw.uniform(0.0, 0.55 * whole_s), draw.randrange(2))
        if trial["killed_after_s"] is not None:
            mine = _final(out / f"killed-{number}")
            trial["equal"] = mine.keys() == wanted.keys() and all(torch.equal(mine[key], wanted[key]) for key in wanted)
        found.append(trial)
        bar.advance(1, json.dumps(trial))
    bar.close()
    return {"schema": "chaos/1", "whole_s": round(whole_s, 1), "seed": seed, "trials": found}


def to_markdown(result: dict[str, Any], command: str) -> str:
    """What was tried, how often, what was lost."""
    killed = [trial for trial in result["trials"] if trial["killed_after_s"] is not None]
    good = [trial for trial in killed if trial["equal"] and trial["status"] == 0]
    lines = [
        "# Chaos: ranks killed at random moments", "",
        f"Made by `{command}` on CPU, two gloo ranks. One rank of a run gets SIGKILL; `--max_restarts {_RESTARTS}` "
        "starts the ranks again and `--resume auto` goes on. Compared are all weights, buffers, moments and masks of "
        f"the last checkpoint with those of the undisturbed run ({result['whole_s']:.0f} s).", "",
        f"**{len(good)} of {len(killed)} killed runs ended equal bit for bit.**", "",
        "| trial | rank killed | after s | while | exit status | took s | equal |",
        "| ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]  # fmt: skip
    for t in result["trials"]:
        if t["killed_after_s"] is None:
            lines.append(f"| {t['trial']} | {t['rank']} | – | {t['note']} | | | |")
        else:
            lines.append(
                f"| {t['trial']} | {t['rank']} | {t['killed_after_s']} | {t['while']} | {t['status']} | {t['took_s']} "
                f"| {'yes' if t['equal'] else 'NO'} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and kill; returns 1 where a run did not come back equal."""
    parser = argparse.ArgumentParser(prog="python -m launch.chaos", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("shards/data/digits"), help="default %(default)s")
    parser.add_argument("--trials", type=int, default=20, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, default %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/chaos"), help="default %(default)s")
    parser.add_argument("--out", type=Path, help="folder for chaos.json and chaos.md, for example results")
    options = parser.parse_args(argv)
    result = run_trials(options.data_dir.resolve(), options.runs.resolve(), options.trials, options.seed)
    text = to_markdown(result, "python -m launch.chaos " + " ".join(sys.argv[1:] if argv is None else argv))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "chaos.md").write_text(text)
    print(text)  # noqa: T201
    return 0 if all(t["killed_after_s"] is None or (t["equal"] and t["status"] == 0) for t in result["trials"]) else 1


if __name__ == "__main__":
    sys.exit(main())
