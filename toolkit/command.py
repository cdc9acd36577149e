"""What every command does alike: flags, errors in one line, words on stderr, and how it was called."""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from toolkit.log import printable


def command_parser(module: str, about: str | None, flags: Mapping[str, Mapping[str, Any]]) -> argparse.ArgumentParser:
    """The parser of `python -m <module>`; `flags` has what argparse's `add_argument` takes, by its name."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    for name, settings in flags.items():
        parser.add_argument(name, **settings)
    return parser


@contextlib.contextmanager
def one_line_errors(parser: argparse.ArgumentParser, left: str = "nothing half-made is left") -> Iterator[None]:
    """End with status 2 and one line where the user has something to mend (ValueError, OSError, a missing package).

    After Ctrl-C, also while something is imported, with 130 and a line that says what is `left` behind.
    """
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog.removeprefix('python -m ')}: stopped; {left}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog.removeprefix('python -m ')}: error: {error}\n")
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("toolkit", "launch", "shards")):  # our own fault
            raise
        remedy = "install this package with its [all] extra, or from a checkout by make setup"
        parser.exit(2, f"{parser.prog.removeprefix('python -m ')}: error: {error.name} is not installed; {remedy}\n")


def say(text: str) -> None:
    """A line on stderr: stdout is for results."""
    print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


def spelled(module: str, argv: Sequence[str] | None) -> str:
    """The command that is running, to be pasted; `argv` as its `main` was given it."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])
