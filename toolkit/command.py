"""What every command does alike: errors in one line, words on stderr, and how it was called."""

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence

from toolkit.log import printable


@contextlib.contextmanager
def one_line_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End with status 2 and one line where the user has something to mend (ValueError, OSError)."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog.removeprefix('python -m ')}: error: {error}\n")


def say(text: str) -> None:
    """A line on stderr: stdout is for results."""
    print(printable(text), file=sys.stderr, flush=True)  # noqa: T201


def spelled(module: str, argv: Sequence[str] | None) -> str:
    """The command that is running, to be pasted; `argv` as its `main` was given it."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])
