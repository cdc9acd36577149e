"""Shards behind a URL: whole files fetched into a bounded folder on this host, checked, and read there like local ones.

webdataset's `gopen` opens the URL (http, https, s3, gs, `pipe:`). A server that stalls, drops the connection or sends
something else costs another try with growing pauses; what cannot be had right is an error, never a sample less.
"""

import hashlib
import json
import os
import queue
import shlex
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.index import (
    INFO_NAME,
    ShardIndex,
    check_count,
    index_path,
    read_index,
    read_info,
    scan_shards,
    split_entry,
)
from toolkit.files import cache_folder, locked
from toolkit.log import get_logger

__all__ = ["ShardCache", "fetch", "fetch_info", "is_remote", "load_remote_split", "remote_folder"]

ATTEMPTS = 6
FIRST_PAUSE_S = 0.5  # doubled after each failed try: 0.5 + 1 + 2 + 4 + 8 s in all
STALL_S = 30.0  # without a byte for so long, a transfer is given up
_PIECE_BYTES = 2**16  # small, so that a slow link is not taken for a stalled one


def is_remote(data_dir: str) -> bool:
    """Whether --data-dir is a URL prefix."""
    return "://" in data_dir or data_dir.startswith("pipe:")


def _url(prefix: str, name: str) -> str:
    """The URL of a file: `{}` in the prefix stands for its name, otherwise it comes behind a slash."""
    url = prefix.replace("{}", name) if "{}" in prefix else f"{prefix.rstrip('/')}/{name}"
    return f"pipe:aws s3 cp {shlex.quote(url)} -" if url.startswith("s3://") else url  # gopen knows no s3


def _transfer(url: str, target: Path) -> None:
    """Copy a URL to a file. Raises OSError where it ends badly or stalls."""
    from webdataset import gopen

    stream = gopen(url, "rb")
    failed: list[BaseException] = []
    last_s = time.monotonic()

    def copy() -> None:
        nonlocal last_s
        try:
            with open(target, "wb") as file:
                while piece := stream.read(_PIECE_BYTES):
                    file.write(piece)
                    last_s = time.monotonic()
                file.flush()
                os.fsync(file.fileno())
            stream.close()  # raises where the command behind the stream failed
        except BaseException as error:  # raised again below, in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        if thread.is_alive() and time.monotonic() - last_s > STALL_S:
            process = getattr(stream, "proc", None)
            if process is not None:
                process.kill()  # ends the read in the other thread
            thread.join(5)
            raise OSError(f"no data for {STALL_S:g} s")
    if failed:
        raise OSError(f"{type(failed[0]).__name__}: {failed[0]}") from failed[0]


def fetch(url: str, target: Path, check: Callable[[Path], None], attempts: int = ATTEMPTS) -> None:
    """Bring a URL to `target`, atomically, trying again where the transfer fails or `check` raises ValueError.

    Raises ValueError that names the URL and the last fault when all tries have failed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    pause_s, fault = FIRST_PAUSE_S, ""
    try:
        for attempt in range(1, attempts + 1):
            try:
                _transfer(url, temporary)
                check(temporary)
            except (OSError, ValueError) as error:
                fault = str(error)
                get_logger().warning("%s: try %d of %d failed: %s", url, attempt, attempts, fault)
                if attempt < attempts:
                    time.sleep(pause_s)
                    pause_s *= 2
                continue
            temporary.replace(target)
            return
    finally:
        temporary.unlink(missing_ok=True)
    raise ValueError(f"{url} could not be fetched in {attempts} tries, the last fault: {fault}; check the server")


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

    def open(self, shard: int) -> int:
        """File descriptor of a shard, fetched if it is not there."""
        path = self.index.folder / self.index.names[shard]
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._fetch(shard, wait=True)
                continue
            with suppress(FileNotFoundError):
                os.utime(path)  # used now: the last to go
            return descriptor

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
            shard = wanted.get()
            try:
                self._fetch(shard, wait=False)
            except (ValueError, OSError) as error:  # whoever needs it will try again and report
                get_logger().warning("fetching ahead failed: %s", error)

    def _fetch(self, shard: int, wait: bool) -> None:
        path = self.index.folder / self.index.names[shard]
        with locked(path, wait) as mine:
            if not mine or (path.is_file() and path.stat().st_size == self.index.shard_bytes[shard]):
                return
            with self._room_for(path, self.index.shard_bytes[shard]):
                fetch(_url(self.prefix, self.index.names[shard]), path, lambda got: self._check(got, shard))

    def _check(self, path: Path, shard: int) -> None:
        """Raise ValueError unless the file has the size and every image the checksum of the index."""
        index, size = self.index, path.stat().st_size
        if size != index.shard_bytes[shard]:
            raise ValueError(
                f"{size} bytes came, the index says {index.shard_bytes[shard]}; if the shards were made anew, delete "
                f"{index.folder}"
            )
        if not index.has_checksums:
            return
        with open(path, "rb") as file:
            for row in np.flatnonzero(index.shard == shard).tolist():
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
            found = []
            for other in self.index.folder.rglob("*"):
                if other.suffix not in (".tar", ".room", ".tmp"):
                    continue
                with suppress(FileNotFoundError):
                    stat = other.stat()
                    owner = other.name.split(".")[-3:][0]
                    if other.suffix != ".tar" and owner.isdigit() and not _alive(int(owner)):
                        other.unlink()  # left by a process that was killed
                        continue
                    if other.suffix == ".tmp":
                        continue  # its room is reserved
                    found.append((stat.st_mtime_ns, stat.st_size, other))
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


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def remote_folder(prefix: str) -> Path:
    """Where the shards of a URL prefix are kept unless told otherwise."""
    return cache_folder() / "shards" / hashlib.sha256(prefix.encode()).hexdigest()[:16]


def fetch_info(prefix: str, folder: Path) -> dict[str, Any]:
    """The `_info.json` behind a URL prefix, fetched anew at each start. Raises ValueError for an unknown scheme."""
    from webdataset.gopen import gopen_schemes

    scheme = prefix.partition(":")[0]
    if scheme not in (*gopen_schemes, "s3"):
        known = ", ".join(sorted(name for name in gopen_schemes if name != "__default__"))
        raise ValueError(f"--data-dir {prefix}: the scheme {scheme} is not known; use s3, {known}")
    with locked(folder / "start"):  # the ranks of a host, one after the other
        fetch(_url(prefix, INFO_NAME), folder / INFO_NAME, _check_info)
        return read_info(folder)


def load_remote_split(
    prefix: str, info: dict[str, Any], split: str, folder: Path, limit_bytes: int
) -> tuple[ShardIndex, ShardCache]:
    """The index of a split behind a URL prefix, and the cache in `folder` that fetches its shards.

    Shards that have no index there are fetched once each to make one.
    """
    entry = split_entry(info, split, prefix)
    with locked(folder / "start"):
        index = _remote_index(prefix, entry, folder, limit_bytes)
        _drop_other_shards(folder, split, index)
    check_count(index, entry, prefix)
    return index, ShardCache(prefix, index, limit_bytes)


def _drop_other_shards(folder: Path, split: str, index: ShardIndex) -> None:
    """Delete cached shards that were fetched under another index: they may have been made anew under the same names."""
    mark = folder / f"{split}.fingerprint"
    if mark.is_file() and mark.read_text() == index.fingerprint:
        return
    for name in index.names:
        (folder / name).unlink(missing_ok=True)
    mark.write_text(index.fingerprint)


def _check_info(path: Path) -> None:
    try:
        json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is not JSON ({error})") from None


def _check_index(path: Path, sha256: str | None) -> None:
    if sha256 is not None and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"its bytes are not those {INFO_NAME} was written with")
    try:
        read_index(path.parent, path)
    except Exception as error:  # whatever safetensors raises on bytes that are none of its own
        raise ValueError(f"it is no index ({error})") from None


def _remote_index(prefix: str, entry: dict[str, Any], folder: Path, limit_bytes: int) -> ShardIndex:
    path, names, sha256 = index_path(folder, entry["name"]), entry["filenames"], entry.get("index_sha256")
    try:
        fetch(_url(prefix, path.name), path, lambda got: _check_index(got, sha256), ATTEMPTS if sha256 else 3)
        return read_index(folder, path)
    except ValueError:
        if sha256 is not None:  # there is one, so what came instead is a fault
            raise
        get_logger().warning("%s has no %s: every shard is fetched once to make one", prefix, path.name)
    own = path.with_name(f"scanned-{path.name}")
    if own.is_file() and read_index(folder, own).names == tuple(names):
        return read_index(folder, own)
    parts, total = [], 0
    for name in names:
        fetch(_url(prefix, name), folder / name, _check_shard)
        parts.append(scan_shards(folder, [name], checksums=True))
        total += parts[-1].shard_bytes[0]
        if total > limit_bytes:
            (folder / name).unlink()
    index = ShardIndex.joined(parts)
    index.save(own)
    return index


def _check_shard(path: Path) -> None:
    scan_shards(path.parent, [path.name])
