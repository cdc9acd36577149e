"""`python -m launch.matrix FILE`: run every cell of a test matrix, one `accelerate launch train.py` after the other.

A matrix is YAML: `name`, `accelerate_config`, `recipe`, `seeds` and `cells`, each cell a mapping of train.py settings.
Cell by cell the folder is runs/<name>/<model>_<opt>_<pruning>[_<sparsity %>]_seed<N>/. A finished cell is not run
again, an unfinished one goes on from its checkpoint, a failed one is recorded with its log and the matrix goes on.
"""

import argparse
import csv
import fnmatch
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toolkit.config import Config, check_same_settings, parse
from toolkit.engine.records import is_complete
from toolkit.progress import Progress

__all__ = ["Cell", "Matrix", "load_matrix", "main"]

_KEYS = ("name", "accelerate_config", "recipe", "seeds", "cells")
_POLL_S = 2.0
_STOP_S = 60.0


@dataclass(frozen=True)
class Cell:
    """One training run of a matrix: its name, train.py's arguments, and the settings these amount to."""

    name: str
    arguments: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class Matrix:
    """A matrix as read from its file, with the cells of all seeds."""

    name: str
    accelerate_config: str
    cells: tuple[Cell, ...]

    def command(self, cell: Cell, runs: Path) -> list[str]:
        """The cell as one command that can be pasted."""
        place = ["--output", str(runs), "--experiment", cell.name, "--resume", "auto"]
        return ["accelerate", "launch", "--config_file", self.accelerate_config, "train.py", *cell.arguments, *place]


def load_matrix(path: Path, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()) -> Matrix:
    """Read a matrix file. `overrides` are train.py arguments for every cell. Raises ValueError on an unknown key."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"matrix {path} cannot be read ({' '.join(str(error).split())}); check the path") from None
    unknown = sorted(set(content) - set(_KEYS))
    missing = sorted(set(_KEYS) - set(content))
    if unknown or missing:
        raise ValueError(f"matrix {path}: unknown keys {unknown}, missing keys {missing}; valid: {', '.join(_KEYS)}")
    cells: list[Cell] = []
    for seed in seeds if seeds is not None else content["seeds"]:
        for settings in content["cells"]:
            arguments = ["-c", content["recipe"], *_arguments(settings), *overrides, "--seed", str(seed)]
            config = parse(arguments, prog=f"{path} cell {settings}")
            if _cell_name(config) in {cell.name for cell in cells}:
                raise ValueError(
                    f"matrix {path}: two cells are named {_cell_name(config)}; their difference does not show in "
                    "the name, put one of them into a matrix of its own"
                )
            cells.append(Cell(_cell_name(config), tuple(arguments), config))
    return Matrix(content["name"], content["accelerate_config"], tuple(cells))


def _arguments(settings: dict[str, Any]) -> list[str]:
    arguments = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        elif isinstance(value, dict):
            arguments += [flag, *(f"{name}={entry}" for name, entry in value.items())]
        else:
            arguments += [flag, str(value)]
    return arguments


def _cell_name(config: Config) -> str:
    method = config.pruning or ("state" if config.opt in ("adamwprune", "sgdprune") else "none")
    share = f"_{100 * config.sparsity:g}" if config.sparsity else ""
    return f"{config.model}_{config.opt}_{method}{share}_seed{config.seed}"


def _progress_of(folder: Path) -> tuple[int, str]:
    """(finished epochs, last accuracy) of a run, from its summary.csv."""
    try:
        with open(folder / "summary.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        return 0, ""
    return len(rows), f"top-1 {float(rows[-1]['eval_top1']):.2f} %" if rows and rows[-1]["eval_top1"] else ""


def run_matrix(matrix: Matrix, cells: Sequence[Cell], runs: Path) -> list[str]:
    """Run the cells that are not complete. Returns the names of those that failed."""
    runs.mkdir(parents=True, exist_ok=True)
    progress = Progress(sum(cell.config.epochs for cell in cells), "epochs", matrix.name)
    failed = []
    for number, cell in enumerate(cells, 1):
        folder = runs / cell.name
        if is_complete(folder):
            progress.skip(cell.config.epochs, f"cell {number}/{len(cells)} {cell.name} was complete")
            continue
        status = _run_cell(matrix, cell, folder, progress, f"cell {number}/{len(cells)} {cell.name}")
        if status != 0 or not is_complete(folder):
            failed.append(cell.name)
            _say(f"FAILED {cell.name} (exit status {status}), see {folder / 'console.log'}; the matrix goes on")
    progress.close()
    return failed


def _run_cell(matrix: Matrix, cell: Cell, folder: Path, progress: Progress, label: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    command = matrix.command(cell, folder.parent)
    _say(f"{label}\n  {shlex.join(command)}")
    launcher = Path(sys.executable).with_name("accelerate")
    begin, seen = time.monotonic(), _progress_of(folder)[0]
    progress.skip(seen)
    with open(folder / "console.log", "a") as log:
        # In a session of its own: Ctrl-C reaches it once, from here, and the launcher passes it on to the ranks.
        process = subprocess.Popen(
            [str(launcher), *command[1:]], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                epochs, note = _progress_of(folder)
                if epochs > seen:
                    progress.advance(epochs - seen, f"{label}: {note}")
                    seen = epochs
        except KeyboardInterrupt:
            _say(f"stopping {cell.name}: it saves a checkpoint; the same command goes on from there")
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_S)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()  # the ranks die with it
            raise
    epochs, note = _progress_of(folder)
    progress.advance(epochs - seen, f"{label}: {note}, {time.monotonic() - begin:.0f} s")
    return process.returncode


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and run; returns 1 where a cell failed, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m launch.matrix", description=__doc__)
    parser.add_argument("file", type=Path, help="matrix, for example launch/matrices/demo.yaml")
    parser.add_argument("--out", type=Path, help="folder of the cells' run folders (default runs/<name>)")
    parser.add_argument("--only", default="*", metavar="GLOB", help="cells whose name matches")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--model", help="instead of the recipe's")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--dry-run", action="store_true", help="print each cell's command and stop")
    options = parser.parse_args(argv)
    overrides = []
    for flag in ("model", "epochs"):
        value = getattr(options, flag)
        overrides += [] if value is None else [f"--{flag}", str(value)]
    try:
        matrix = load_matrix(options.file, options.seeds, overrides)
    except ValueError as error:
        parser.exit(2, f"launch.matrix: error: {error}\n")
    runs = options.out or Path("runs") / matrix.name
    cells = [cell for cell in matrix.cells if fnmatch.fnmatch(cell.name, options.only)]
    if not cells:
        names = ", ".join(cell.name for cell in matrix.cells)
        parser.exit(2, f"launch.matrix: error: --only {options.only} matches no cell; there are {names}\n")
    if options.dry_run:
        for cell in cells:
            print(shlex.join(matrix.command(cell, runs)))  # noqa: T201
        return 0
    try:
        for cell in cells:
            check_same_settings(runs / cell.name, cell.config)
        failed = run_matrix(matrix, cells, runs)
    except ValueError as error:
        parser.exit(2, f"launch.matrix: error: {error}\n")
    except KeyboardInterrupt:
        return 130
    if failed:
        _say(f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}; call again to retry them")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
