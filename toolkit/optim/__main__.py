"""`python -m toolkit.optim --list`: the optimizer names of this toolkit, with what each is."""

import argparse
import json
import sys

from toolkit.optim.registry import specs


def main() -> None:
    """Print the names."""
    parser = argparse.ArgumentParser(prog="python -m toolkit.optim", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print every name with a description")
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    options = parser.parse_args()
    if options.json:
        print(json.dumps({spec.name: spec.description for spec in specs()}))  # noqa: T201
    elif options.list:
        width = max(len(spec.name) for spec in specs())
        for spec in specs():
            print(f"{spec.name:<{width}}  {spec.description}")  # noqa: T201
    else:
        parser.print_help(sys.stdout)


if __name__ == "__main__":
    main()
