"""Files that are whole or not there, where the toolkit keeps what it can make again, and how processes take turns."""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cache_folder", "locked", "replacing", "shipped_folder", "sync_to_disk", "write_atomically"]

_IN_CHECKOUT = {"accelerate_configs": "accelerate_configs", "recipes": "launch/recipes"}


def cache_folder() -> Path:
    """The toolkit's folder under the user's cache folder; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adamwprune-toolkit"


def shipped_folder(name: str) -> Path:
    """`accelerate_configs` or `recipes`: package data where the toolkit is installed, else the checkout's folder."""
    installed = Path(__file__).parent / name
    return installed if installed.is_dir() else Path(__file__).parents[1] / _IN_CHECKOUT[name]


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


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which takes its place at the end; after an error nothing is left.

    `sync` has the content on the disk before that: a power cut leaves the old file or the new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        yield temporary
        if sync:
            sync_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes, sync: bool = False) -> None:
    """Write a whole file, so that a reader finds the old content or the new. Makes the folder; see `replacing`."""
    with replacing(path, sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
