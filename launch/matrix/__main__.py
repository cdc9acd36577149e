"""`python -m launch.matrix FILE`: run every cell of a test matrix (`launch.matrix.cells` says what one is).

Cell by cell the folder is runs/<name>/<model>_<opt>_<pruning>[_<sparsity %>]_seed<N>/. A finished cell is not run
again, an unfinished one goes on from its checkpoint, a failed one is recorded with its log and the matrix goes on.
"""

import shlex
import signal
import sys
from pathlib import Path

from launch.matrix.cells import SELECTION, selected
from launch.matrix.run import failed_cells, run_matrix
from launch.report.archive import COMMAND_FILE
from toolkit.builder.resume import check_same_settings
from toolkit.command import command_parser, one_line_errors, say, spelled
from toolkit.files import write_atomically

_THEN = " && "


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and run; returns 1 where a cell failed, 130 after Ctrl-C."""
    parser = command_parser(
        "launch.matrix",
        __doc__,
        {
            **SELECTION,
            "--out": {"type": Path, "help": "folder of the cells' run folders (default runs/<name>)"},
            "--jobs": {
                "type": int,
                "help": "cells at a time instead of the file's; they share the cores, and GPUs if there are",
            },
            "--failed": {"action": "store_true", "help": "only cells that failed before"},
            "--dry-run": {"action": "store_true", "help": "print each cell's command and stop"},
        },
    )
    options = parser.parse_args(argv)
    with one_line_errors(parser):
        matrix, cells = selected(options)
        runs = options.out or Path("runs") / matrix.name
        if options.failed:
            cells = [cell for cell in cells if cell.name in failed_cells(runs)]
        if not cells:
            say(f"no failed cell in {runs}")
            return 0
        if options.dry_run:
            print("\n".join(shlex.join(matrix.command(cell, runs)) for cell in cells))  # noqa: T201
            return 0
        for number in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal too: the cells shall save
            signal.signal(number, signal.default_int_handler)
        for cell in cells:
            check_same_settings(runs / cell.name, cell.config)
        if not options.failed and options.only == "*":  # these are parts of an earlier call
            _note_command(runs / COMMAND_FILE, str(options.file), spelled("launch.matrix", argv))
        try:
            failed = run_matrix(matrix, cells, runs, options.jobs or matrix.jobs)
        except KeyboardInterrupt:
            return 130
    if failed:
        say(f"{len(failed)} of {len(cells)} cells failed: {', '.join(failed)}; call again or with --failed to retry")
    return 1 if failed else 0


def _note_command(path: Path, matrix: str, command: str) -> None:
    """Write what made a folder's runs: this matrix's last command, after those of others with the same folder."""
    before = path.read_text().strip().split(_THEN) if path.exists() else []
    write_atomically(path, _THEN.join([*(one for one in before if matrix not in shlex.split(one)), command]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
