"""`python -m launch.report RUNS --out results/<study>`: runs -> report.md, report.html, tables and pictures.

RUNS is a folder of run folders or the runs.jsonl.xz of a report, which has them all. Every figure is read from there;
nothing is typed in. Final-epoch accuracy is the headline, the best epoch stands beside it.
"""

import sys
from pathlib import Path

from launch.report.archive import read_runs, unpack
from launch.report.report import printed_table, write_report
from launch.report.runs import group_by_method
from toolkit.command import command_parser, one_line_errors, say
from toolkit.log import printable


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and write the report, or the run folders."""
    parser = command_parser(
        "launch.report",
        __doc__,
        {
            "runs": {"type": Path, "help": "folder of run folders, as runs/demo; one of these; or a runs.jsonl.xz"},
            "--out": {"type": Path, "help": "folder of the report, or a file FILE.md for its tables alone"},
            "--baseline": {"metavar": "NAME", "help": "method, or one of its runs, that rankings subtract from"},
            "--brief": {"action": "store_true", "help": "only report.md, its pictures, summary.json, runs.jsonl.xz"},
            "--unpack": {"type": Path, "metavar": "FOLDER", "help": "write the runs as run folders below FOLDER"},
        },
    )
    options = parser.parse_args(argv)
    if not (options.out or options.unpack):
        parser.error("give --out for a report, or --unpack for run folders")
    left = f"files are missing from {options.out or options.unpack}, or old; the same command makes all anew"
    with one_line_errors(parser, left):
        runs, left_out = read_runs(options.runs)
        for name in left_out:
            say(f"left out, not complete: {name}")
        if options.unpack:
            unpack(runs, options.unpack)
        if options.out:
            write_report(runs, options.out, options.runs, options.baseline, brief=options.brief)
            print(printable(printed_table(group_by_method(runs))))  # noqa: T201
            pages = [options.out / name for name in ("report.md", "report.html")][: 1 if options.brief else 2]
            say(f"\n{options.out if options.out.suffix == '.md' else ' and '.join(map(str, pages))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
