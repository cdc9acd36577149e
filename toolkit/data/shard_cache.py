"""The shards of a data set behind a URL, in a bounded folder on this host, where they are read like local ones.

The folder may hold files that are not the cache's; a shard that it fetched has its lock beside it, and only such files
are ever replaced or deleted.
"""

import os
import queue
import re
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.index import MAX_LEFT_OUT, ShardIndex, check_count
from toolkit.data.info import split_entry
from toolkit.data.remote import fetch, file_url, remote_index
from toolkit.files import inside, locked
from toolkit.log import get_logger

_UNDER_WAY = re.compile(r"(?P<shard>.+\.tar)\.(?P<process>\d{1,9})\.\d+\.(?:tmp|room)")


def load_remote_split(
    prefix: str,
    info: dict[str, Any],
    split: str,
    folder: Path,
    limit_bytes: int,
    max_left_out: float = MAX_LEFT_OUT,
) -> tuple[ShardIndex, "ShardCache"]:
    """The index of a split behind a URL prefix, and the cache in `folder` that fetches its shards.

    Shards that have no index there are fetched once each to make one. Raises ValueError for what is missing, damaged or
    unsafe, for too many images left out (see `load_split`), and where a shard would take the place of a file that is
    not the cache's.
    """
    entry = split_entry(info, split, prefix)
    _check_places(prefix, folder, entry["filenames"])
    with locked(folder / "start"):
        index = remote_index(prefix, entry, folder, limit_bytes)
        _check_places(prefix, folder, index.names)
        _drop_other_shards(folder, split, index)
    check_count(index, entry, prefix, max_left_out)
    return index, ShardCache(prefix, index, limit_bytes)


def _check_places(prefix: str, folder: Path, names: Iterable[str]) -> None:
    """Raise ValueError unless every shard can be asked for, and has a place of its own in the folder."""
    for name in names:
        file_url(prefix, name)
        path = inside(folder, name, f"shard in {folder}:")
        if path.suffix != ".tar":  # the cache's own files have other endings
            raise ValueError(f"shard {name!r} does not end in .tar; behind a URL all must")
        if path.exists() and not _is_ours(path):
            raise ValueError(f"{path} was not fetched by this cache; move it away, or name another --shard-cache")


def _is_ours(shard: Path) -> bool:
    return shard.with_name(shard.name + ".lock").exists()


def _drop_other_shards(folder: Path, split: str, index: ShardIndex) -> None:
    """Delete cached shards that were fetched under another index: they may have been made anew under the same names."""
    mark = folder / f"{split}.fingerprint"
    if not mark.is_file() or mark.read_text() != index.fingerprint:
        for name in index.names:
            inside(folder, name, f"shard in {folder}:").unlink(missing_ok=True)
        mark.write_text(index.fingerprint)


class ShardCache:
    """The shards of a split on this host: fetched when wanted, the least recently used go when room is needed.

    Ranks and workers of a host share the folder; a lock for each shard lets one of them fetch it. A shard that another
    process has open may be taken away: its open file stays readable.
    """

    def __init__(self, prefix: str, index: ShardIndex, limit_bytes: int) -> None:
        largest = max(index.shard_bytes, default=0)
        if limit_bytes < 2 * largest:
            raise ValueError(
                f"--shard-cache-gib {limit_bytes / 2**30:.3g} does not hold two shards of {largest / 2**30:.3g} GiB; "
                f"use at least {2 * largest / 2**30:.3g}"
            )
        self.prefix = prefix
        self.index = index
        self.limit_bytes = limit_bytes
        self._ahead: queue.SimpleQueue[int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None}  # threads stay in their process

    def _path(self, shard: int) -> Path:
        return inside(self.index.folder, self.index.names[shard], f"shard in {self.index.folder}:")

    def open(self, shard: int) -> int:
        """File descriptor of a shard, fetched if it is not there."""
        path = self._path(shard)
        while True:
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                os.utime(descriptor)  # used now: the last to go
                return descriptor
            self._fetch(shard, wait=True)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Fetch shards in the background; one that another process is fetching is left to it."""
        if self._ahead is None:
            self._ahead = queue.SimpleQueue()
            for _ in range(2):  # daemons: an exit does not wait for what nobody will read
                threading.Thread(target=self._fetch_ahead, args=(self._ahead,), daemon=True).start()
        for shard in shards:
            self._ahead.put(shard)

    def _fetch_ahead(self, wanted: "queue.SimpleQueue[int]") -> None:
        while True:
            try:
                self._fetch(wanted.get(), wait=False)
            except (ValueError, OSError) as error:  # whoever needs it will try again and report
                get_logger().warning("fetching ahead failed: %s", error)

    def _fetch(self, shard: int, wait: bool) -> None:
        path, size = self._path(shard), self.index.shard_bytes[shard]
        with locked(path, wait) as mine:
            if mine and not (path.is_file() and path.stat().st_size == size):
                with self._room_for(path, size):
                    url = file_url(self.prefix, self.index.names[shard])
                    fetch(url, path, partial(self._check, shard), limit_bytes=size)

    def _check(self, shard: int, path: Path) -> None:
        """Raise ValueError unless the file has the size and every image the checksum of the index."""
        index, size = self.index, path.stat().st_size
        if size != index.shard_bytes[shard]:
            raise ValueError(
                f"{size} bytes came, the index says {index.shard_bytes[shard]}; if the shards were made anew, delete "
                f"{index.folder}"
            )
        with open(path, "rb") as file:
            for row in np.flatnonzero(index.has_checksums & (index.shard == shard)).tolist():
                data = os.pread(file.fileno(), int(index.size[row]), int(index.offset[row]))
                if zlib.crc32(data) != int(index.crc32[row]):
                    raise ValueError(f"image {row} came with other bytes than the index was made from")

    @contextmanager
    def _room_for(self, path: Path, needed_bytes: int) -> Iterator[None]:
        """Delete the least recently used shards until `needed_bytes` fit, and keep that room until the shard is there.

        An empty file of that length stands for what is on its way, so that two fetches do not take the same room.
        """
        reserved = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.room")
        with locked(self.index.folder / "room"):
            found = list(self._taken())
            total = sum(size for _, size, _ in found)
            for _, size, other in sorted(found):
                if total + needed_bytes <= self.limit_bytes:
                    break
                if other.suffix == ".tar":
                    other.unlink(missing_ok=True)
                    total -= size
            with open(reserved, "wb") as file:
                file.truncate(needed_bytes)
        try:
            yield
        finally:
            reserved.unlink(missing_ok=True)

    def _taken(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of each shard here, of any data set, and of each room kept for one."""
        for path in self.index.folder.rglob("*"):
            under_way = _UNDER_WAY.fullmatch(path.name)
            shard = path.with_name(under_way["shard"]) if under_way else path
            if shard.suffix != ".tar" or not _is_ours(shard):
                continue
            with suppress(FileNotFoundError):
                stat = path.stat()
                if under_way and not _alive(int(under_way["process"])):
                    path.unlink()  # left by a process that was killed
                elif path.suffix != ".tmp":  # its room is reserved
                    yield stat.st_mtime_ns, stat.st_size, path


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True
