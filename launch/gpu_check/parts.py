"""A plan's parts: read with their commands filled in, and run, each in a process of its own with a limit."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launch.start import ROOT, installed
from toolkit.process import die_with_parent

PLANS = ROOT / "launch" / "gpu_check" / "plans"
GRACE_S = 10.0  # for what saves before it ends
_KEPT = 4000  # characters of a part's words
_NO_MEMORY = re.compile(r"OutOfMemory|out of memory|MemoryError")


@dataclass(frozen=True)
class Part:
    """A command of the product, and the seconds it may take.

    `always`: in every call, also where it has ended well before. `kill`: it is meant to be killed at its limit.
    """

    name: str
    limit_s: float
    command: str
    always: bool = False
    kill: bool = False


def load_plan(path: Path, data: Sequence[Path], work: Path, out: Path) -> tuple[bool, list[Part]]:
    """Whether the plan needs a GPU, and its parts; those that name {data} once for each data set, the first one first.

    They are left out where there is no data set. Raises ValueError for a file that is no plan.
    """
    try:
        content = yaml.safe_load(path.read_text())
        parts, needs_gpu = [Part(**part) for part in content["parts"]], bool(content["needs_gpu"])
    except (yaml.YAMLError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no plan ({error!r}); it has needs_gpu and parts, see {PLANS}") from None
    found = []
    for place, folder in enumerate(data or [None]):
        where = {"data": folder, "work": work, "out": out, "runs": work / (folder.name if folder else "no-data")}
        for part in parts:
            on_data = "{data}" in part.command
            if (on_data and folder is not None) or (not on_data and not place):
                name = f"{part.name}, {folder.name}" if folder and place else part.name
                found.append(replace(part, name=name, command=part.command.format(**where)))
    return needs_gpu, found


def run_part(part: Part, limit_s: float, log: Path) -> dict[str, Any]:
    """Run a part for at most `limit_s` and a grace: how it ended, seconds, last words, and its JSON if it has one."""
    begin, ended_by_us = time.monotonic(), ""
    log.parent.mkdir(parents=True, exist_ok=True)
    streams = {name: log.with_name(f"{log.name}.{name}") for name in ("stdout", "stderr")}
    with streams["stdout"].open("w") as stdout, streams["stderr"].open("w") as stderr:
        process = subprocess.Popen(
            installed(shlex.split(part.command)),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    stops = ((limit_s, signal.SIGTERM), (GRACE_S, signal.SIGKILL))
    for wait_s, number in ((limit_s, signal.SIGKILL),) if part.kill else stops:
        try:
            process.wait(wait_s)
            break
        except subprocess.TimeoutExpired:
            ended_by_us = "ok" if part.kill else "over its limit"
            os.killpg(process.pid, number)
    status = process.wait()
    with contextlib.suppress(ProcessLookupError):  # what it has left behind would hold memory of the next part
        os.killpg(process.pid, signal.SIGKILL)
    words = {name: path.read_text(errors="replace") for name, path in streams.items()}
    failed = "out of memory" if _NO_MEMORY.search("".join(words.values())) else f"exit status {status}"
    outcome = ended_by_us or ("ok" if status == 0 else failed)
    *_, last = words["stdout"].splitlines() or [""]
    result = json.loads(last) if outcome == "ok" and last.startswith("{") else None
    kept = {name: "" if result else text[-_KEPT:] for name, text in words.items()}
    return {"outcome": outcome, "seconds": round(time.monotonic() - begin, 1), **kept, "result": result}
