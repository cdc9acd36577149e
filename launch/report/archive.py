"""Reads and keeps the runs of a study: a folder of run folders, or one file.

`runs.jsonl.xz` has a line a run, in the order they were started: name, made_by (the command of all), args, metrics,
memory, epochs (summary.csv) and timeline (memory_timeline.csv; empty where it was not kept). The same runs give the
same bytes.
"""

import csv
import gzip
import json
import lzma
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.report.runs import CellRun
from toolkit.engine.history import is_complete
from toolkit.files import JSON_LIMIT_BYTES, check_name, csv_text, inside, read_json, write_atomically

COMMAND_FILE = "command.txt"  # of launch.matrix, beside the run folders
RUNS_FILE = "runs.jsonl.xz"


def read_runs(source: Path) -> tuple[list[CellRun], list[str]]:
    """(complete runs in the order they were started, names of the incomplete ones) of a folder of run folders, of one
    run folder, or of a file that `write_runs` wrote. Raises ValueError for none.
    """
    if source.is_file():
        return _read_file(source), []
    own = (source / "args.yaml").is_file()
    folders = [source] if own else sorted(path.parent for path in source.glob("*/args.yaml"))
    done = sorted(filter(is_complete, folders), key=lambda path: (path / "args.yaml").stat().st_mtime)
    if not done:
        raise ValueError(f"{source} holds no complete run; give a finished run folder, or a folder of them")
    command = (source.parent if own else source) / COMMAND_FILE
    made_by = command.read_text().strip() if command.exists() else ""
    return [_read_folder(path, made_by) for path in done], [path.name for path in folders if path not in done]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def _read_folder(folder: Path, made_by: str) -> CellRun:
    names = ("metrics.json", "memory.json", "args.yaml", "summary.csv", "memory_timeline.csv")
    # A link out would bring any file into the report's copy.
    metrics, memory, args, epochs, timeline = (inside(folder, name, f"{folder}:") for name in names)
    return CellRun(
        folder,
        read_json(metrics),
        read_json(memory),
        _read_settings(args),
        read_rows(epochs),
        read_rows(timeline),
        made_by,
    )


class _Plain(yaml.SafeLoader):
    """YAML without references: with them a few lines stand for more text than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("its parts refer to each other")
        return super().compose_node(parent, index)


def _read_settings(path: Path) -> dict[str, Any]:
    """args.yaml. Raises ValueError for one that no run has written."""
    try:
        settings = yaml.load(path.read_text(), _Plain) if path.stat().st_size <= JSON_LIMIT_BYTES else None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}); take the run out") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is no mapping of settings; take the run out")
    return settings


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of the file, gzip in studies of before; a bomb's are not held."""
    with lzma.open(path) if path.suffix == ".xz" else gzip.open(path) as file:
        while line := file.readline(JSON_LIMIT_BYTES + 1):
            if len(line) > JSON_LIMIT_BYTES:
                raise ValueError(f"a line has more than {JSON_LIMIT_BYTES:,} bytes")
            yield line


def _read_file(path: Path) -> list[CellRun]:
    runs = []
    try:
        for line in _lines(path):
            run = json.loads(line)
            check_name(run["name"], f"{path}: run")
            records = (run[key] for key in ("metrics", "memory", "args", "epochs", "timeline", "made_by"))
            runs.append(CellRun(path.parent / "cells" / run["name"], *records))
        if not runs:
            raise ValueError("no run in it")
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what launch.report keeps of a study ({error!r}); give a {RUNS_FILE}") from None
    return runs


def write_runs(runs: Sequence[CellRun], path: Path) -> None:
    """Keep the runs in one file, from which `read_runs` makes the same again."""
    lines = [
        {
            "name": run.folder.name,
            "made_by": run.made_by,
            "args": run.arguments,
            "metrics": run.metrics,
            "memory": run.memory,
            "epochs": run.epochs,
            "timeline": run.timeline,
        }
        for run in runs
    ]
    # Runs are alike, and a line has more than the 32 KiB that gzip looks back: xz makes a quarter of its size.
    write_atomically(path, lzma.compress("".join(map(_compact, lines)).encode()))


def unpack(runs: Sequence[CellRun], folder: Path) -> None:
    """The runs as run folders below `folder`, without what a report does not read (checkpoints, logs)."""
    begin = time.time() - len(runs)
    for number, run in enumerate(runs):
        cell = folder / run.folder.name
        for name, rows in (("summary.csv", run.epochs), ("memory_timeline.csv", run.timeline)):
            write_atomically(cell / name, csv_text(list(rows[0]) if rows else (), rows))
        for name, content in (("metrics.json", run.metrics), ("memory.json", run.memory)):
            write_atomically(cell / name, _compact(content))
        write_atomically(cell / "args.yaml", yaml.safe_dump(run.arguments, sort_keys=False))
        os.utime(cell / "args.yaml", (begin + number,) * 2)  # the order in which they are read
    if runs[0].made_by:
        write_atomically(folder / COMMAND_FILE, runs[0].made_by + "\n")


def _compact(content: Any) -> str:
    """JSON without spaces, for there may be hundreds."""
    return json.dumps(content, separators=(",", ":")) + "\n"
