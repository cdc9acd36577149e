"""Where the toolkit keeps what it can make or fetch again, and how processes of a host take turns there."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cache_folder", "locked"]


def cache_folder() -> Path:
    """The toolkit's folder under the user's cache folder; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adamwprune-toolkit"


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """One process at a time for `path` (by a file beside it); the lock dies with its process.

    Gives True under the lock, or False without it where another process has it and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
