"""`python -m launch.matrix FILE`: run every cell of a test matrix (`launch.matrix.cells` says what one is).

Cell by cell the folder is runs/<name>/<model>_<opt>_<pruning>[_<sparsity %>]_seed<N>/. A finished cell is not run
again, an unfinished one goes on from its checkpoint, a failed one is recorded with its log and the matrix goes on.
"""

import argparse
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.matrix.cells import Cell, Matrix, add_selection, selected
from launch.report.runs import COMMAND_FILE
from toolkit.builder.resume import check_same_settings
from toolkit.engine.history import is_complete
from toolkit.process import die_with_parent
from toolkit.progress import Progress

__all__ = ["failed_cells", "main", "run_matrix"]

_POLL_S = 2.0
_STOP_S = 60.0


def _progress_of(folder: Path) -> tuple[int, str]:
    """(finished epochs, last accuracy) of a run, from its summary.csv."""
    try:
        with open(folder / "summary.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        return 0, ""
    return len(rows), f"top-1 {float(rows[-1]['eval_top1']):.2f} %" if rows and rows[-1]["eval_top1"] else ""


class _Job:
    """One cell's process."""

    def __init__(self, matrix: Matrix, cell: Cell, runs: Path, label: str, jobs: int) -> None:
        self.cell, self.folder, self.label = cell, runs / cell.name, label
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seen, self._begin = _progress_of(self.folder)[0], time.monotonic()
        command = matrix.command(cell, runs)
        _say(f"{label}\n  {shlex.join(command)}")
        environment = dict(os.environ)
        if jobs > 1:  # side by side each has its share of the cores
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        self._log = open(self.folder / "console.log", "a")  # noqa: SIM115  closed when the process ends
        # In a session of its own: Ctrl-C reaches it once, from here; several ranks get it from their launcher.
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name(command[0])), *command[1:]],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            preexec_fn=die_with_parent,
        )

    def report(self, progress: Progress) -> None:
        """Tell of the epochs finished since the last call."""
        epochs, note = _progress_of(self.folder)
        if self.process.poll() is not None:
            note += f", {time.monotonic() - self._begin:.0f} s"
        if epochs > self.seen or self.process.poll() is not None:
            progress.advance(epochs - self.seen, f"{self.label}: {note}")
            self.seen = epochs

    def ended(self) -> bool:
        """Whether the process is gone; then its log is closed."""
        if self.process.poll() is None:
            return False
        self._log.close()
        return True

    def stop(self, deadline: float) -> None:
        """Wait for the end after SIGINT, then put an end to it."""
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self.process.kill()  # the ranks die with it
        self._log.close()


def run_matrix(matrix: Matrix, cells: Sequence[Cell], runs: Path, jobs: int = 1) -> list[str]:
    """Run the cells that are not complete, `jobs` at a time. Returns the names of those that failed.

    They are also in runs/failed.json, each with its exit status and log.
    """
    runs.mkdir(parents=True, exist_ok=True)
    progress = Progress(sum(cell.config.epochs for cell in cells), "epochs", matrix.name)
    waiting = []
    for cell in cells:
        if is_complete(runs / cell.name):
            progress.skip(cell.config.epochs, f"{cell.name} was complete")
        else:
            waiting.append(cell)
    done, failed, running = len(cells) - len(waiting), [], list[_Job]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                label = f"cell {done + len(running) + 1}/{len(cells)} {cell.name}"
                running.append(_Job(matrix, cell, runs, label, jobs))
                progress.skip(running[-1].seen)
            time.sleep(_POLL_S)
            for job in running:
                job.report(progress)
            for job in [job for job in running if job.ended()]:
                running.remove(job)
                done += 1
                fine = job.process.returncode == 0 and is_complete(job.folder)
                _record(runs, job, None if fine else job.process.returncode)
                if not fine:
                    failed.append(job.cell.name)
    except KeyboardInterrupt:
        _say(f"stopping {', '.join(job.cell.name for job in running)}: checkpoints are saved, the same command goes on")
        for job in running:
            os.killpg(job.process.pid, signal.SIGINT)  # one rank: its launcher passes nothing on
        deadline = time.monotonic() + _STOP_S
        for job in running:
            job.stop(deadline)
        raise
    progress.close()
    return failed


def failed_cells(runs: Path) -> dict[str, Any]:
    """What failed.json says: name -> exit status and log; a cell that was finished by hand since is left out."""
    try:
        known = json.loads((runs / "failed.json").read_text())
    except FileNotFoundError:
        return {}
    return {name: entry for name, entry in known.items() if not is_complete(runs / name)}


def _record(runs: Path, job: _Job, status: int | None) -> None:
    """Note a failure in failed.json, or that there is none any more."""
    known = failed_cells(runs)
    if status is None:
        known.pop(job.cell.name, None)
    else:
        known[job.cell.name] = {"status": status, "log": str(job.folder / "console.log")}
        _say(f"FAILED {job.cell.name} (exit status {status}), see {job.folder / 'console.log'}; the matrix goes on")
    temporary = runs / "failed.json.tmp"
    temporary.write_text(json.dumps(known, indent=1) + "\n")
    temporary.replace(runs / "failed.json")


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and run; returns 1 where a cell failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m launch.matrix", description=__doc__)
    add_selection(parser)
    parser.add_argument("--out", type=Path, help="folder of the cells' run folders (default runs/<name>)")
    parser.add_argument(
        "--jobs", type=int, help="cells at a time instead of the file's; they share the cores, and GPUs if there are"
    )
    parser.add_argument("--failed", action="store_true", help="only cells that failed before")
    parser.add_argument("--dry-run", action="store_true", help="print each cell's command and stop")
    options = parser.parse_args(argv)
    try:
        matrix, cells = selected(options)
    except ValueError as error:
        parser.exit(2, f"launch.matrix: error: {error}\n")
    runs = options.out or Path("runs") / matrix.name
    if options.failed:
        cells = [cell for cell in cells if cell.name in failed_cells(runs)]
        if not cells:
            _say(f"no failed cell in {runs}")
            return 0
    if options.dry_run:
        for cell in cells:
            print(shlex.join(matrix.command(cell, runs)))  # noqa: T201
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal too: the cells shall save
        signal.signal(number, _interrupt)
    try:
        for cell in cells:
            check_same_settings(runs / cell.name, cell.config)
        runs.mkdir(parents=True, exist_ok=True)
        given = sys.argv[1:] if argv is None else argv
        if not options.failed and options.only == "*":  # these are parts of an earlier call
            (runs / COMMAND_FILE).write_text(shlex.join(["python", "-m", "launch.matrix", *given]) + "\n")
        failed = run_matrix(matrix, cells, runs, options.jobs or matrix.jobs)
    except ValueError as error:
        parser.exit(2, f"launch.matrix: error: {error}\n")
    except KeyboardInterrupt:
        return 130
    if failed:
        _say(f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}; call again or with --failed to retry")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
