"""`python -m launch.gpu_check --minutes 9 --data DIR --out DIR`: everything here that needs a GPU, in one window.

A plan (launch/gpu_check/plans/) names the parts in order of worth: each is a command of the product in a process of its
own, with a limit in seconds. What hangs, dies or runs out of memory is written down, and the rest goes on.
gpu_check.json and .md, and the archives of finished runs, are written after each part. The same command does what is
left, and then again what failed.
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch

from launch.gpu_check.page import run_row, to_markdown
from launch.gpu_check.parts import GRACE_S, PLANS, load_plan, run_part
from launch.report.archive import read_runs, write_runs
from toolkit.command import command_parser, one_line_errors, say, spelled
from toolkit.files import read_json, write_result

_LEAST_S = 5.0  # with less left no part is begun


def _archive(work: Path, out: Path) -> list[dict[str, Any]]:
    """Keep the finished runs of each study below `work` as one file in `out`; a row a run."""
    rows = []
    for study in sorted({path.parents[1] for path in work.glob("**/args.yaml")}):
        with contextlib.suppress(ValueError):  # no complete run in it yet
            runs, name = read_runs(study)[0], "-".join(study.relative_to(work).parts)
            write_runs(runs, out / f"{name}.jsonl.xz")
            rows += [run_row(run, name) for run in runs]
    return rows


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and run the plan; returns 1 where a part did not end well or was not reached."""
    parser = command_parser(
        "launch.gpu_check",
        __doc__,
        {
            "--minutes": {"type": float, "default": 9.0, "help": "time to use (default %(default)s)"},
            "--data": {"type": Path, "nargs": "+", "default": [], "help": "folders of shards, for parts that train"},
            "--out": {"type": Path, "required": True, "help": "folder of the results; goes on from what is there"},
            "--work": {"type": Path, "default": Path("runs/gpu"), "help": "of runs and logs (default %(default)s)"},
            "--plan": {"type": Path, "default": PLANS / "window.yaml", "help": "what to run (default %(default)s)"},
        },
    )
    options = parser.parse_args(argv)
    begin, kept = time.monotonic(), options.out / "gpu_check.json"
    with one_line_errors(parser):
        out, work = options.out.resolve(), options.work.resolve()
        needs_gpu, parts = load_plan(options.plan, [folder.resolve() for folder in options.data], work, out)
        if needs_gpu and not torch.cuda.is_available():
            raise ValueError("torch sees no GPU here; nothing was measured (--plan with stand-in.yaml needs none)")
        known = read_json(kept)["parts"] if kept.exists() else {}
    todo = [part for part in parts if part.always or known.get(part.name, {}).get("outcome") != "ok"]
    for part in sorted(todo, key=lambda part: part.name in known and not part.always):
        left_s = 60 * options.minutes - (time.monotonic() - begin) - GRACE_S
        if left_s < _LEAST_S:
            break
        limit_s = min(part.limit_s, left_s)
        say(f"{time.monotonic() - begin:5.0f} s  {part.name}, at most {limit_s:.0f} s: {part.command}")
        known[part.name] = {"command": part.command, **run_part(part, limit_s, work / "logs" / part.name)}
        say(f"{time.monotonic() - begin:5.0f} s  {part.name}: {known[part.name]['outcome']}")
        result = {
            "schema": "gpu-check/2",
            "command": spelled("launch.gpu_check", argv),
            "parts": {part.name: known[part.name] for part in parts if part.name in known},
            "not_run": [part.name for part in parts if part.name not in known],
            "runs": _archive(work, options.out),
        }
        write_result(options.out, "gpu_check", result, to_markdown(result))
    return 0 if all(known.get(part.name, {}).get("outcome") == "ok" for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
