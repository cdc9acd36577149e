"""`python -m toolkit.memory.predict`: what training will take of a GPU, row by row, before one is touched.

Takes every flag of train.py (python train.py --help lists them) with its default, --num-classes 1000 where it is not
given, and those below. No data is read.
"""

import argparse
import json
import sys
from pathlib import Path

from toolkit.cli import parse
from toolkit.command import one_line_errors, say


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and predict."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.memory.predict", description=__doc__, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=1, help="default %(default)s")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=0, help="DeepSpeed stage")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2")
    parser.add_argument("--fits", metavar="SIZE", help="does it fit this much memory, for example 48GiB?")
    parser.add_argument("--max-batch-size", metavar="SIZE", help="the largest batch size in this much memory")
    parser.add_argument(
        "--table",
        metavar="FOLDER",
        nargs="?",
        const="results/bench",
        help="largest batches of six models on four cards (minutes) -> fits.md, .json, .csv there; default %(const)s",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on one line on stdout")
    options, flags = parser.parse_known_args(argv)
    config = parse(flags, prog=parser.prog)

    with one_line_errors(parser):
        from toolkit.builder.fits import write_table
        from toolkit.builder.predict import parse_bytes, predict, to_text

        if options.table:
            print(write_table(config, Path(options.table), say))  # noqa: T201
            return 0
        result = predict(
            config,
            options.ranks,
            f"zero{options.zero}" if options.zero else "fsdp2" if options.fsdp else "ddp",
            limit_bytes=parse_bytes(options.fits) if options.fits else None,
            max_bytes=parse_bytes(options.max_batch_size) if options.max_batch_size else None,
            log=say,
        )
        print(json.dumps(result) if options.json else to_text(result))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
