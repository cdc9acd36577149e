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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launch.chaos.traced_train import ROOT, final_state, launch_command, part_of, quiet_environment, ranks_of
from toolkit.data.index import load_split
from toolkit.engine.checkpoint import complete_checkpoints, damage_of
from toolkit.progress import Progress

__all__ = ["FAULTS", "run_faults"]

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1
_WAIT_S = 180

Outcome = tuple[str, bool | None]  # None: could not be tried here


class _Trial:
    """One fault's folder, data and the undisturbed run's final state."""

    def __init__(self, data: Path, out: Path, name: str, wanted: dict[str, torch.Tensor]) -> None:
        self.data, self.out, self.name, self.wanted = data, out, name, wanted
        self.log = out / f"{name}.log"
        self.parts = out / f"{name}.part"
        self.folder = out / name

    def command(self, *more: str) -> list[str]:
        return launch_command(self.data, self.out, self.name, *more)

    @contextmanager
    def running(self, command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        with open(self.log, "a") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=quiet_environment(self.parts), **options
            )
            try:
                yield process
            finally:
                process.kill()

    def run(self, command: list[str], **options: Any) -> int:
        with self.running(command, **options) as process:
            return process.wait(_WAIT_S)

    def said(self, words: str) -> bool:
        return words in self.log.read_text()

    def equal(self) -> bool:
        mine = final_state(self.folder)
        return mine.keys() == self.wanted.keys() and all(torch.equal(mine[key], self.wanted[key]) for key in mine)

    def await_step(self, process: subprocess.Popen[bytes]) -> dict[int, int]:
        """Wait until both ranks train; returns their process numbers."""
        while process.poll() is None and {part_of(self.parts, rank) for rank in (0, 1)} == {"loading"}:
            time.sleep(0.05)
        time.sleep(1.0)
        return ranks_of(process.pid)


def _corrupt_samples(trial: _Trial) -> Outcome:
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
    metrics = json.loads((trial.folder / "metrics.json").read_text()) if status == 0 else {}
    counted, epochs = metrics.get("bad_images", 0), metrics.get("epochs", 4)
    fine = status == 0 and metrics["completed"] and 0 < counted <= len(chosen) * epochs
    return (
        f"{len(chosen)} of {len(index)} images damaged, --max-bad-images 0.02: trained to the end, counted {counted} "
        f"in {epochs} epochs, exit status {status}"
    ), fine


def _not_finite(trial: _Trial) -> Outcome:
    status = trial.run(trial.command("--opt", "sgd", "--pruning", "none", "--lr", "1e30", "--checkpoint-interval", "1"))
    kept = complete_checkpoints(trial.folder / "checkpoints")
    sound = bool(kept) and all(damage_of(path) is None for path in kept)
    fine = status != 0 and sound and trial.said("no rank made the update")
    return f"stopped before the update, exit status {status}, {len(kept)} sound checkpoint(s) kept", fine


def _two_runs(trial: _Trial) -> Outcome:
    with trial.running(trial.command()) as first:
        ranks = trial.await_step(first)
        for number in ranks.values():  # it must not end before the second has started
            os.kill(number, signal.SIGSTOP)
        second = subprocess.run(
            trial.command(), cwd=ROOT, env=quiet_environment(trial.out / "second.part"), capture_output=True, text=True
        )
        for number in ranks.values():
            os.kill(number, signal.SIGCONT)
        status = first.wait(_WAIT_S)
    refused = second.returncode != 0 and "is being written by another run" in second.stderr
    return f"second refused with one line: {refused}; first ended {status}, weights equal: {trial.equal()}", (
        refused and status == 0 and trial.equal()
    )


def _hang(trial: _Trial) -> Outcome:
    with trial.running(trial.command("--dist-timeout", "10")) as process:
        ranks = trial.await_step(process)
        begin = time.monotonic()
        os.kill(ranks[1], signal.SIGSTOP)
        status = process.wait(_WAIT_S)
    named = trial.said("lost rank 1 (last heard of at step")
    took = time.monotonic() - begin
    resumed = trial.run(trial.command())
    fine = named and status != 0 and resumed == 0 and trial.equal()
    return (
        f"rank 1 stopped with SIGSTOP, --dist-timeout 10: named {named}, launcher gone after {took:.0f} s; resumed, "
        f"weights equal: {trial.equal()}"
    ), fine


def _launcher_killed(trial: _Trial) -> Outcome:
    with trial.running(trial.command()) as process:
        ranks = trial.await_step(process)
        process.kill()
        process.wait()
        begin = time.monotonic()
        while any(Path(f"/proc/{number}").exists() for number in ranks.values()) and time.monotonic() - begin < 60:
            time.sleep(0.01)
        gone_s = time.monotonic() - begin
    resumed = trial.run(trial.command())
    fine = gone_s < 5 and resumed == 0 and trial.equal()
    return f"SIGKILL: its ranks were gone after {gone_s:.2f} s; resumed, weights equal: {trial.equal()}", fine


def _asked_to_stop(trial: _Trial) -> Outcome:
    with trial.running(trial.command()) as process:
        trial.await_step(process)
        process.terminate()
        status = process.wait(_WAIT_S)
    saved = trial.said("checkpoint saved in")
    resumed = trial.run(trial.command())
    fine = saved and resumed == 0 and trial.equal()
    return f"SIGTERM to the launcher: saved {saved}, exit status {status}; resumed, equal: {trial.equal()}", fine


def _in_mount(trial: _Trial, options: str, command: list[str], after: str = "true") -> int | None:
    """Run with a tmpfs as --output, in a mount namespace of its own; None without the right to make one."""
    mount = trial.out / "mount"
    mount.mkdir(exist_ok=True)
    script = f'mount -t tmpfs -o {options} none "$0" && "$@"; status=$?; {after}; exit $status'
    try:
        subprocess.run(["unshare", "--mount", "--map-root-user", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return trial.run(["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(mount), *command])


def _disk_full(trial: _Trial) -> Outcome:
    command = launch_command(trial.data, trial.out / "mount", trial.name, "--checkpoint-hist", "1")
    newest = complete_checkpoints(trial.out / "whole" / "checkpoints")
    one_kib = sum(file.stat().st_size for file in newest[-1].rglob("*") if file.is_file()) // 1024
    listing = 'ls -d "$0"/*/checkpoints/*; cat "$0"/*/metrics.json'
    status = _in_mount(trial, f"size={int(1.7 * one_kib) + 200}k", command, listing)
    if status is None:
        return "not tried: no right to make a mount namespace here", None
    fine = status == 0 and trial.said("could not be written") and trial.said('"completed": true')
    return f"room for 1.7 checkpoints: said so and trained to the end, exit status {status}", fine


def _read_only(trial: _Trial) -> Outcome:
    status = _in_mount(trial, "ro", launch_command(trial.data, trial.out / "mount", trial.name))
    if status is None:
        return "not tried: no right to make a mount namespace here", None
    fine = status != 0 and trial.said("Read-only file system")
    return f"one line, exit status {status}", fine and _lines_of_error(trial) == 1


def _no_permission(trial: _Trial) -> Outcome:
    locked = trial.out / "locked"
    locked.mkdir(exist_ok=True)
    locked.chmod(0o555)
    libc = ctypes.CDLL(None)
    drop = partial(libc.prctl, _PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE)  # root would not be stopped by the bits
    status = trial.run(launch_command(trial.data, locked, trial.name), preexec_fn=lambda: drop() and None)
    fine = status != 0 and trial.said("Permission denied") and not list(locked.iterdir())
    return f"one line, exit status {status}, nothing written", fine and _lines_of_error(trial) == 1


def _lines_of_error(trial: _Trial) -> int:
    """How often train.py said what is wrong (the launcher's own words come on top)."""
    return sum("train.py: error:" in line for line in trial.log.read_text().splitlines())


FAULTS: dict[str, Callable[[_Trial], Outcome]] = {
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


def run_faults(
    data: Path, out: Path, wanted: dict[str, torch.Tensor], only: tuple[str, ...] = tuple(FAULTS)
) -> list[dict[str, Any]]:
    """Try the faults named; `wanted` is the undisturbed run's final state."""
    out.mkdir(parents=True, exist_ok=True)
    bar, found = Progress(len(only), "faults", "faults"), []
    for number, fault in enumerate(only):
        begin = time.monotonic()
        happened, fine = FAULTS[fault](_Trial(data, out, f"fault-{number}", wanted))
        found.append(
            {"fault": fault, "happened": happened, "as_promised": fine, "took_s": round(time.monotonic() - begin, 1)}
        )
        bar.advance(1, json.dumps(found[-1]))
    bar.close()
    return found
