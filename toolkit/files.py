"""Files that are whole or not there, where the toolkit keeps what it can make again, and how processes take turns.

And what others' files may say: which names are taken, and how much JSON. docs/security.md says against whom.
"""

import contextlib
import csv
import fcntl
import functools
import io
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from stat import S_ISDIR
from typing import Any

# 100,000 shards' names take 5 MB. Parsed, JSON may take 20 times its bytes.
JSON_LIMIT_BYTES = 2**24
_SHOWN = 200  # characters of a name in an error
# Controls, line ends, another system's slash, and halves of surrogate pairs, which are no file's name: but U+DC80 to
# U+DCFF, which stand for bytes of names that are no UTF-8.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\\\ud800-\udc7f\udd00-\udfff]")


class UnsafeNameError(ValueError):
    """A name from a file, a server or a flag that leads elsewhere than below its folder."""


def check_name(name: Any, what: str, *, dash: bool = False) -> str:
    """`name`, if it is a plain file name or a relative path below a folder; `what` says in the error whose it is.

    Raises UnsafeNameError for anything else: no text, empty, absolute, with `..`, a backslash, a control character or
    (unless `dash`) a minus sign in front, which commands take for an option.
    """
    if isinstance(name, str) and not _UNSAFE.search(name) and not (name.startswith("-") and not dash):
        parts = name.split("/")
        if parts[-1] != "." and not {"", ".."} & set(parts):
            return name
    raise UnsafeNameError(
        f"{what} {repr(name)[:_SHOWN]} is not a plain name or a path below its folder; use one without .., a leading "
        "/ or -, backslashes and control characters"
    )


def inside(folder: Path, name: Any, what: str) -> Path:
    """`folder / name` for a file that is to be written, deleted or trusted; as `check_name`, and links are followed.

    Raises UnsafeNameError also where a link leads out of the folder.
    """
    path = folder / check_name(name, what)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise UnsafeNameError(f"{what} {name!r} leads out of {folder} by a link; put the file itself there")
    return path


def refuse_links_out(folder: Path) -> None:
    """Raise UnsafeNameError where something below `folder`, which is to be written to, is a link that leads out."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            inside(folder, str(path.relative_to(folder)), f"{folder}:")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError for one that is none, or is larger than JSON_LIMIT_BYTES."""
    with open(path, "rb") as file:
        content = file.read(JSON_LIMIT_BYTES + 1)
    if len(content) > JSON_LIMIT_BYTES:
        raise ValueError(f"{path} has more than {JSON_LIMIT_BYTES:,} bytes of JSON; such a file is not taken")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # the latter: brackets by the thousand
        raise ValueError(f"{path} is not JSON ({error}); make or fetch it again") from None


_IN_CHECKOUT = {"accelerate_configs": "accelerate_configs", "recipes": "launch/recipes"}


def cache_folder() -> Path:
    """The toolkit's folder under the user's cache folder; it need not exist.

    A user without a home (a container's, by number alone) has a folder of its own below the temporary one; said once.
    Raises ValueError where another user has made that.
    """
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "adamwprune-toolkit"
    try:
        return Path.home() / ".cache" / "adamwprune-toolkit"
    except RuntimeError:  # neither HOME nor a line in passwd
        return _homeless_cache(Path(tempfile.gettempdir()) / f"adamwprune-toolkit-{os.getuid()}")


@functools.cache
def _homeless_cache(folder: Path) -> Path:
    folder.mkdir(mode=0o700, exist_ok=True)
    stat = folder.lstat()  # native code is loaded from there: nobody else may have put it there
    if not S_ISDIR(stat.st_mode) or stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        raise ValueError(f"{folder} is not this user's alone, and there is no home folder; set HOME or XDG_CACHE_HOME")
    logging.getLogger("toolkit").warning(
        "no home folder: the cache is in %s; set HOME or XDG_CACHE_HOME to keep it elsewhere", folder
    )
    return folder


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
    # The folder may be a stranger's data set: a link in the lock's place is not followed, and nothing is cut short.
    descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which takes its place at the end; after an error nothing is left.

    `sync` has the content on the disk before that: a power cut leaves the old file or the new one. An OSError over the
    temporary file names `path`, the one that was asked for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # whatever lies there: a link would be written through
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # by the umask; safetensors makes files that nobody else may read
        try:
            yield temporary
            temporary.chmod(mode)
            if sync:
                sync_to_disk(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_atomically(path: Path, content: str | bytes, sync: bool = False) -> None:
    """Write a whole file, so that a reader finds the old content or the new. Makes the folder; see `replacing`."""
    with replacing(path, sync) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Write a JSON file whole or not at all."""
    write_atomically(path, json.dumps(content, indent=indent) + "\n")


def write_result(folder: Path, name: str, result: dict[str, Any], text: str) -> None:
    """Write a measured result as `<name>.json` for programs and `<name>.md` for people; the folder is made."""
    write_json(folder / f"{name}.json", result, indent=1)
    write_atomically(folder / f"{name}.md", text)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table as CSV, its header first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
