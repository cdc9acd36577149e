"""What `launch.chaos` tried, how often, and whether anything was lost."""

from typing import Any

from launch.chaos.kills import RESTARTS
from toolkit.markdown import page, table

_ANSWER = {True: "yes", False: "NO", None: "not tried"}


def all_well(result: dict[str, Any]) -> bool:
    """Whether every kill ended equal, and every fault as promised."""
    return all(kill["equal"] and kill["status"] == 0 and kill["while"] for kill in result["kills"]) and all(
        fault["as_promised"] is not False for fault in result["faults"]
    )


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The tables for results/."""
    struck = [kill for kill in result["kills"] if kill["while"] is not None]
    good = [kill for kill in struck if kill["equal"] and kill["status"] == 0]
    kills = [
        [
            kill["trial"],
            kill["rank"],
            kill["aimed_at"],
            kill["while"] or "the run had ended",
            kill["status"],
            kill.get("took_s", ""),
            _ANSWER[kill["equal"]],
        ]
        for kill in result["kills"]
    ]
    faults = [[fault["fault"], fault["happened"], _ANSWER[fault["as_promised"]]] for fault in result["faults"]]
    header = ["trial", "rank", "aimed at", "struck in", "exit status", "took s", "equal"]
    return page(
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
        *table(header, kills, text=(2, 3, 6)),
        "",
        "## Other faults",
        "",
        *table(["fault", "what happened", "as promised"], faults, text=range(3)),
        "",
        "**Lost: nothing.**" if all_well(result) else "**Something was lost: see NO above.**",
    )
