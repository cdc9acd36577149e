"""Other faults, each tried on a real run: what it said, its exit status, and whether anything was lost.

Every function makes one fault and returns (what happened in a few words, whether that is what is promised).
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from launch.chaos.trial import WAIT_S, State, Trial
from toolkit.data.index import load_split
from toolkit.engine.checkpoint import complete_checkpoints, damage_of
from toolkit.files import read_json
from toolkit.progress import Progress

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1

Outcome = tuple[str, bool | None]


class _NotTriedError(Exception):
    """A fault that cannot be made on this machine."""


def _corrupt_samples(trial: Trial) -> Outcome:
    damaged = shutil.copytree(trial.data, trial.out / "corrupt-data", dirs_exist_ok=True)
    index = load_split(damaged, "train")
    chosen = range(0, len(index), 100)
    for sample in chosen:
        path = damaged / index.names[int(index.shard[sample])]
        content = bytearray(path.read_bytes())
        content[int(index.offset[sample]) + 30] ^= 255
        path.write_bytes(bytes(content))
    trial.data = damaged
    status = trial.run(trial.command("--max-bad-images", "0.02"))
    metrics = read_json(trial.folder / "metrics.json") if status == 0 else {"completed": False}
    counted, epochs = metrics.get("bad_images", 0), metrics.get("epochs", 4)
    return (
        f"{len(chosen)} of {len(index)} images damaged, --max-bad-images 0.02: trained to the end, counted {counted} "
        f"in {epochs} epochs, exit status {status}"
    ), metrics["completed"] and 0 < counted <= len(chosen) * epochs


def _not_finite(trial: Trial) -> Outcome:
    status = trial.run(trial.command("--opt", "sgd", "--pruning", "none", "--lr", "1e30", "--checkpoint-interval", "1"))
    kept = complete_checkpoints(trial.folder / "checkpoints")
    sound = bool(kept) and all(damage_of(path) is None for path in kept)
    happened = f"stopped before the update, exit status {status}, {len(kept)} sound checkpoint(s) kept"
    return happened, status != 0 and sound and trial.said("no rank made the update")


def _two_runs(trial: Trial) -> Outcome:
    with trial.running(trial.command()) as first:
        ranks = trial.await_step(first)
        for number in ranks.values():  # it must not end before the second has started
            os.kill(number, signal.SIGSTOP)
        second = Trial(trial.data, trial.out, f"{trial.name}-second")
        refused = second.run(trial.command()) != 0 and second.said("is being written by another run")
        for number in ranks.values():
            os.kill(number, signal.SIGCONT)
        status = first.wait(WAIT_S)
    equal = trial.equal()
    happened = f"second refused with one line: {refused}; first ended {status}, weights equal: {equal}"
    return happened, refused and status == 0 and equal


def _hang(trial: Trial) -> Outcome:
    with trial.running(trial.command("--dist-timeout", "10")) as process:
        ranks = trial.await_step(process)
        begin = time.monotonic()
        os.kill(ranks[1], signal.SIGSTOP)
        status = process.wait(WAIT_S)
    named = trial.said("lost rank 1 (last heard of at step")
    took = time.monotonic() - begin
    equal = trial.resumes()
    return (
        f"rank 1 stopped with SIGSTOP, --dist-timeout 10: named {named}, launcher gone after {took:.0f} s; resumed, "
        f"weights equal: {equal}"
    ), named and status != 0 and equal


def _launcher_killed(trial: Trial) -> Outcome:
    with trial.running(trial.command()) as process:
        ranks = trial.await_step(process)
        process.kill()
        process.wait()
        begin = time.monotonic()
        while any(Path(f"/proc/{number}").exists() for number in ranks.values()) and time.monotonic() - begin < 60:
            time.sleep(0.01)
        gone_s = time.monotonic() - begin
    equal = trial.resumes()
    return f"SIGKILL: its ranks were gone after {gone_s:.2f} s; resumed, weights equal: {equal}", gone_s < 5 and equal


def _asked_to_stop(trial: Trial) -> Outcome:
    with trial.running(trial.command()) as process:
        trial.await_step(process)
        process.terminate()
        status = process.wait(WAIT_S)
    saved = trial.said("checkpoint saved in")
    equal = trial.resumes()
    return f"SIGTERM to the launcher: saved {saved}, exit status {status}; resumed, equal: {equal}", saved and equal


def _in_mount(trial: Trial, options: str, *more: str, after: str = "true") -> int:
    """Run with a tmpfs as --output, in a mount namespace of its own. Raises _NotTriedError without the right to one."""
    mount = trial.out / "mount"
    mount.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o {options} none "$0" && "$@"; status=$?; {after}; exit $status'
    alone = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        raise _NotTriedError("no right to make a mount namespace here")
    return trial.run([*alone, "sh", "-c", script, str(mount), *trial.command(*more, output=mount)])


def _disk_full(trial: Trial) -> Outcome:
    newest = complete_checkpoints(trial.out / "whole" / "checkpoints")
    one_kib = sum(file.stat().st_size for file in newest[-1].rglob("*") if file.is_file()) // 1024
    listing = 'ls -d "$0"/*/checkpoints/*; cat "$0"/*/metrics.json'
    status = _in_mount(trial, f"size={int(1.7 * one_kib) + 200}k", "--checkpoint-hist", "1", after=listing)
    fine = status == 0 and trial.said("could not be written") and trial.said('"completed": true')
    return f"room for 1.7 checkpoints: said so and trained to the end, exit status {status}", fine


def _read_only(trial: Trial) -> Outcome:
    status = _in_mount(trial, "ro")
    fine = status != 0 and trial.said("Read-only file system") and _lines_of_error(trial) == 1
    return f"one line, exit status {status}", fine


def _no_permission(trial: Trial) -> Outcome:
    locked = trial.out / "locked"
    locked.mkdir(exist_ok=True)
    locked.chmod(0o555)
    # Root would not be stopped by the bits.
    drop = partial(ctypes.CDLL(None).prctl, _PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE)
    status = trial.run(trial.command(output=locked), preexec_fn=drop)
    fine = status != 0 and trial.said("Permission denied") and not list(locked.iterdir())
    return f"one line, exit status {status}, nothing written", fine and _lines_of_error(trial) == 1


def _lines_of_error(trial: Trial) -> int:
    """How often train.py said what is wrong (the launcher's own words come on top)."""
    return sum("train.py: error:" in line for line in trial.log.read_text().splitlines())


FAULTS: dict[str, Callable[[Trial], Outcome]] = {
    "1 % of the training images damaged": _corrupt_samples,
    "loss not finite": _not_finite,
    "two runs into one folder": _two_runs,
    "a rank hangs": _hang,
    "the launcher is killed": _launcher_killed,
    "asked to stop": _asked_to_stop,
    "disk full while saving": _disk_full,
    "output on a read-only disk": _read_only,
    "no permission to write": _no_permission,
}


def run_faults(data: Path, out: Path, wanted: State, only: tuple[str, ...] = tuple(FAULTS)) -> list[dict[str, Any]]:
    """Try the faults named; `wanted` is the undisturbed run's final state."""
    found = []
    with Progress(len(only), "faults", "faults") as bar:
        for number, fault in enumerate(only):
            begin = time.monotonic()
            try:
                happened, fine = FAULTS[fault](Trial(data, out, f"fault-{number}", wanted))
            except _NotTriedError as reason:
                happened, fine = f"not tried: {reason}", None
            took_s = round(time.monotonic() - begin, 1)
            found.append({"fault": fault, "happened": happened, "as_promised": fine, "took_s": took_s})
            bar.advance(1, json.dumps(found[-1]))
    return found
