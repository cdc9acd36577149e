"""`python -m launch.chaos`: disturb real runs of two CPU ranks in every way we know; is anything lost?"""

import sys
from pathlib import Path

from launch.chaos.faults import run_faults
from launch.chaos.kills import run_kills, run_undisturbed
from launch.chaos.report import all_well, to_markdown
from toolkit.command import command_parser, spelled
from toolkit.files import write_result


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and disturb; returns 1 where something was lost."""
    parser = command_parser(
        "launch.chaos",
        __doc__,
        {
            "--data-dir": {"type": Path, "default": Path("shards/data/digits"), "help": "default %(default)s"},
            "--trials": {"type": int, "default": 20, "help": "kills, default %(default)s"},
            "--seed": {"type": int, "default": 0, "help": "of the moments, default %(default)s"},
            "--runs": {"type": Path, "default": Path("runs/chaos"), "help": "default %(default)s"},
            "--out": {"type": Path, "help": "folder for chaos.json and chaos.md, for example results"},
        },
    )
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
    text = to_markdown(result, spelled("launch.chaos", argv))
    if options.out:
        write_result(options.out, "chaos", result, text)
    print(text)  # noqa: T201
    return 0 if all_well(result) else 1


if __name__ == "__main__":
    sys.exit(main())
