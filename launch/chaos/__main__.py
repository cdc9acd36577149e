"""`python -m launch.chaos`: disturb real runs of two CPU ranks in every way we know; is anything lost?"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from launch.chaos.faults import run_faults
from launch.chaos.kills import RESTARTS, run_kills, run_undisturbed

__all__ = ["all_well", "main", "to_markdown"]


_ANSWER = {True: "yes", False: "NO", None: "not tried"}


def all_well(result: dict[str, Any]) -> bool:
    """Whether every kill ended equal, and every fault as promised."""
    return all(kill["equal"] and kill["status"] == 0 and kill["while"] for kill in result["kills"]) and all(
        fault["as_promised"] is not False for fault in result["faults"]
    )


def to_markdown(result: dict[str, Any], command: str) -> str:
    """What was tried, how often, what was lost."""
    struck = [kill for kill in result["kills"] if kill["while"] is not None]
    good = [kill for kill in struck if kill["equal"] and kill["status"] == 0]
    lines = [
        "# Chaos",
        "",
        f"Made by `{command}` on CPU, two gloo ranks under `accelerate launch`, AdamWPrune to 70 % on the digit scans "
        f"({result['whole_s']:.0f} s undisturbed).",
        "",
        "## Ranks killed",
        "",
        f"A random rank gets SIGKILL in each part of its work in turn; `--max_restarts {RESTARTS}` starts the ranks "
        "again and `--resume auto` goes on. Compared are all weights, buffers, moments and masks of the last "
        "checkpoint with those of the undisturbed run.",
        "",
        f"**{len(good)} of {len(struck)} killed runs ended equal bit for bit.**",
        "",
        "| trial | rank | aimed at | struck in | exit status | took s | equal |",
        "| ---: | ---: | --- | --- | ---: | ---: | --- |",
    ]
    for kill in result["kills"]:
        lines.append(
            f"| {kill['trial']} | {kill['rank']} | {kill['aimed_at']} | {kill['while'] or 'the run had ended'} "
            f"| {kill['status']} | {kill.get('took_s', '')} | {'yes' if kill['equal'] else 'NO'} |"
        )
    lines += ["", "## Other faults", "", "| fault | what happened | as promised |", "| --- | --- | --- |"]
    for fault in result["faults"]:
        lines.append(f"| {fault['fault']} | {fault['happened']} | {_ANSWER[fault['as_promised']]} |")
    lines += ["", "**Lost: nothing.**" if all_well(result) else "**Something was lost: see NO above.**"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and disturb; returns 1 where something was lost."""
    parser = argparse.ArgumentParser(prog="python -m launch.chaos", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path("shards/data/digits"), help="default %(default)s")
    parser.add_argument("--trials", type=int, default=20, help="kills, default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, default %(default)s")
    parser.add_argument("--runs", type=Path, default=Path("runs/chaos"), help="default %(default)s")
    parser.add_argument("--out", type=Path, help="folder for chaos.json and chaos.md, for example results")
    options = parser.parse_args(argv)
    data, runs = options.data_dir.resolve(), options.runs.resolve()
    if runs.exists() and any(runs.iterdir()):
        parser.exit(2, f"launch.chaos: error: {runs} holds runs already; remove it or give another --runs\n")
    wanted, whole_s = run_undisturbed(data, runs)
    result = {
        "schema": "chaos/2",
        "whole_s": round(whole_s, 1),
        "seed": options.seed,
        "faults": run_faults(data, runs, wanted),
        "kills": run_kills(data, runs, options.trials, options.seed, wanted),
    }
    text = to_markdown(result, "python -m launch.chaos " + " ".join(sys.argv[1:] if argv is None else argv))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "chaos.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "chaos.md").write_text(text)
    print(text)  # noqa: T201
    return 0 if all_well(result) else 1


if __name__ == "__main__":
    sys.exit(main())
