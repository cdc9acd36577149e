"""Runs the cells of a matrix, several at a time if asked; what fails is recorded and the rest goes on."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.matrix.board import Board
from launch.matrix.cells import Cell, Matrix
from launch.report.archive import read_rows
from launch.start import installed
from toolkit.command import say
from toolkit.engine.history import is_complete
from toolkit.files import read_json, write_json
from toolkit.process import die_with_parent

_POLL_S = 2.0
_STOP_S = 60.0
_LAST_LINES = 15  # of a failed cell's log, which may lie on a machine that is gone when one looks


def _progress_of(folder: Path) -> tuple[int, str]:
    """(finished epochs, last top-1 accuracy in %) of a run, from its summary.csv."""
    try:
        rows = read_rows(folder / "summary.csv")
    except OSError:
        return 0, ""
    measured = [row["eval_top1"] for row in rows if row["eval_top1"]]
    return len(rows), f"{float(measured[-1]):.2f}" if measured else ""


class _Job:
    """One cell's process."""

    def __init__(self, matrix: Matrix, cell: Cell, runs: Path, label: str, jobs: int) -> None:
        self.cell, self.folder = cell, runs / cell.name
        self.log = self.folder / "console.log"
        self.folder.mkdir(parents=True, exist_ok=True)
        command = matrix.command(cell, runs)
        say(f"{label}\n  {shlex.join(command)}")
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}  # side by side: a share of the cores
        # In a session of its own: Ctrl-C reaches it once, from here; several ranks get it from their launcher.
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                installed(command),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **(threads if jobs > 1 else {})},
                preexec_fn=die_with_parent,
            )

    def report(self, board: Board) -> bool:
        """Tell of the epochs finished by now; whether the process has ended."""
        ended = self.process.poll() is not None
        board.reached(self.cell.name, *_progress_of(self.folder))
        return ended


def run_matrix(matrix: Matrix, cells: Sequence[Cell], runs: Path, jobs: int = 1) -> list[str]:
    """Run the cells that are not complete, `jobs` at a time. Returns the names of those that failed.

    They are also in runs/failed.json, each with its exit status and log.
    """
    failed, running, waiting = [], list[_Job](), list[Cell]()
    with Board(matrix.name, cells) as board:
        for cell in cells:
            if is_complete(runs / cell.name):
                board.was_complete(cell.name, _progress_of(runs / cell.name)[1])
            else:
                waiting.append(cell)
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    label = f"cell {len(cells) - len(waiting)}/{len(cells)} {cell.name}"
                    board.started(cell.name, _progress_of(runs / cell.name)[0])
                    running.append(_Job(matrix, cell, runs, label, jobs))
                time.sleep(_POLL_S)
                for job in [job for job in running if job.report(board)]:
                    running.remove(job)
                    fine = _record(runs, job)
                    board.ended(job.cell.name, fine=fine)
                    if not fine:
                        failed.append(job.cell.name)
        except KeyboardInterrupt:
            _stop(running)
            raise
    return failed


def _stop(jobs: Sequence[_Job]) -> None:
    """End what runs; the checkpoints let the same command go on."""
    say(f"stopping {', '.join(job.cell.name for job in jobs)}: checkpoints are saved, the same command goes on")
    for job in jobs:
        os.killpg(job.process.pid, signal.SIGINT)  # one rank: its launcher passes nothing on
    deadline = time.monotonic() + _STOP_S
    for job in jobs:
        try:
            job.process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            job.process.kill()  # the ranks die with it


def failed_cells(runs: Path) -> dict[str, Any]:
    """What failed.json says: name -> exit status and log; a cell that was finished by hand since is left out."""
    try:
        known = read_json(runs / "failed.json")
    except FileNotFoundError:
        return {}
    return {name: entry for name, entry in known.items() if not is_complete(runs / name)}


def _record(runs: Path, job: _Job) -> bool:
    """Whether the cell came to its end; failed.json says it if not."""
    fine = job.process.returncode == 0 and is_complete(job.folder)
    known = failed_cells(runs)
    known.pop(job.cell.name, None)
    if not fine:
        known[job.cell.name] = {"status": job.process.returncode, "log": str(job.log)}
        last = job.log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        failed = f"FAILED {job.cell.name} (exit status {job.process.returncode}), see {job.log}; the matrix goes on"
        say("\n  ".join([failed, *last]))
    write_json(runs / "failed.json", known, indent=1)
    return fine
