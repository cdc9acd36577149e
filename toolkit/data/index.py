"""Where every sample lies: shard, byte offset, size, label and checksum, read once and kept beside the shards.

With the index a sample is one `pread`, the order is free to be any permutation, and a truncated or missing shard is
an error at start, not a silent loss (webdataset's reader drops the rest of a shard cut at a member border).
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.data.info import INFO_NAME, check_shard_names, is_count, read_info, split_entry
from toolkit.data.tar import LOST, MAX_IMAGE_BYTES, LeftOut, leave_out, scan_shard
from toolkit.files import cache_folder, locked, write_atomically
from toolkit.log import get_logger, printable
from toolkit.process import in_processes

_SCAN_ALONE = 16  # shards that one process scans; more are shared by several
_DTYPES = {"shard": np.int32, "offset": np.int64, "size": np.int32, "label": np.int32, "crc32": np.uint32}
_STORED = {"shard": "I32", "offset": "I64", "size": "I32", "label": "I32", "crc32": "U32"}  # safetensors' names
# 24 bytes a row: 44 million images. It is read whole, so more than that is not taken.
INDEX_LIMIT_BYTES = 2**30
MAX_LEFT_OUT = 1e-4  # share of images that may be left out, as --max-bad-images; ten are always let by


@dataclass(frozen=True)
class ShardIndex:
    """One row per sample, in shard order: shard number, offset and size in bytes of the image, label, crc32 of it.

    `folder` holds the files `names`, of `shard_bytes` bytes each. An index made by a scan of headers has no checksums
    (crc32 is 0), and in `modified_ns` the times at which the shards it read had last been changed. `left_out` counts
    what the shards hold and no row stands for, by reason.
    """

    folder: Path
    names: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    crc32: np.ndarray
    has_checksums: bool = True
    modified_ns: tuple[int, ...] = ()
    left_out: LeftOut = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.shard)

    @functools.cached_property
    def shard_lengths(self) -> list[int]:
        """Samples in each shard."""
        return np.bincount(self.shard, minlength=len(self.names)).tolist()

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over shard names, sizes, lengths, labels and image checksums: what a resumed run must find again."""
        shards = json.dumps([self.names, self.shard_bytes, self.shard_lengths]).encode()
        return hashlib.sha256(shards + self.label.tobytes() + self.crc32.tobytes()).hexdigest()

    def check_files(self) -> None:
        """Raise ValueError that names the first shard that is missing or has another size than the index says."""
        for name, expected in zip(self.names, self.shard_bytes, strict=True):
            actual = _size_bytes(self.folder / name)
            if actual != expected:
                raise ValueError(
                    f"shard {self.folder / name} has {actual} bytes, its index says {expected}; copy it again, or "
                    "delete the *.index.safetensors beside it if the shard was replaced on purpose"
                )

    def save(self, path: Path) -> str:
        """Write atomically; the same rows give the same bytes. Returns their sha256."""
        from safetensors.numpy import save

        arrays = {key: np.ascontiguousarray(getattr(self, key)) for key in _DTYPES}
        # One metadata entry only: safetensors writes several in random order.
        facts: dict[str, Any] = {"schema": "shard-index/1", "names": self.names, "bytes": self.shard_bytes}
        if not self.has_checksums:
            facts |= {"has_checksums": False, "modified_ns": self.modified_ns}
        if self.left_out:
            facts["left_out"] = self.left_out
        content = save(arrays, metadata={"shards": json.dumps(facts)})
        write_atomically(path, content)  # ranks may scan at once
        return hashlib.sha256(content).hexdigest()


def index_path(folder: Path, split: str) -> Path:
    """File of a split's index."""
    return folder / f"{split}.index.safetensors"


def load_split(folder: Path, split: str, max_left_out: float = MAX_LEFT_OUT) -> ShardIndex:
    """Open a split: its index, made by one scan of the shards' headers where there is none, checked against the files.

    What the shards hold and the index does not is said; more images than `max_left_out` of all are a ValueError.

    A scanned index is kept beside the shards, or in a cache folder where that cannot be written to, and made again when
    a shard has changed. One that was built with the shards is never: a shard that differs from it is an error.
    """
    entry = split_entry(read_info(folder), split, str(folder))
    names = entry["filenames"]
    index = _current(folder, split, names)
    if index is None:
        path = index_path(folder, split) if os.access(folder, os.W_OK) else _cached_path(folder, split)
        with locked(path):  # the other ranks wait for the scan of the first
            index = _current(folder, split, names)
            if index is None:
                get_logger().info("reading the headers of %d shards in %s", len(names), folder)
                for name in names:  # said before the others are read
                    _size_bytes(folder / name)
                index = scan_shards(folder, names, run=in_processes if len(names) > _SCAN_ALONE else map)
                index.save(path)
    index.check_files()
    check_count(index, entry, str(folder), max_left_out)
    return index


def check_count(index: ShardIndex, entry: dict[str, Any], place: str, max_left_out: float = MAX_LEFT_OUT) -> None:
    """Raise ValueError where a split has another number of samples than its `_info.json` says, or lost too many.

    What was left out is said by reason.
    """
    lines = [f"{count:,} {reason}, first {first}" for reason, (count, first) in index.left_out.items()]
    lost = sum(count for reason, (count, _) in index.left_out.items() if reason in LOST)
    if lost > max(10, max_left_out * (len(index) + lost)) or (lost and not len(index)):
        raise ValueError(
            printable(f"split {entry['name']!r} of {place} would leave out {'; '.join(lines)}; ")
            + "name each sample's files KEY.jpg and KEY.cls, KEY without dots, or raise --max-bad-images"
        )
    for line in lines:
        get_logger().warning("split %r of %s: left out %s", entry["name"], place, printable(line))
    expected = entry.get("num_samples", len(index))
    if len(index) != expected:
        raise ValueError(
            f"split {entry['name']!r} has {len(index)} samples, {INFO_NAME} of {place} says {expected}; a shard was "
            "cut short, build or copy it again"
        )


def _cached_path(folder: Path, split: str) -> Path:
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return index_path(cache_folder() / "index" / key, split)


def _current(folder: Path, split: str, names: Sequence[str]) -> ShardIndex | None:
    """The index beside the shards or in the cache, unless it was scanned from shards that have changed since."""
    for path in (index_path(folder, split), _cached_path(folder, split)):
        if path.is_file():
            index = read_index(folder, path)
            if not index.modified_ns or _unchanged(index, names):
                return index
    return None


def _unchanged(index: ShardIndex, names: Sequence[str]) -> bool:
    if index.names != tuple(names):
        return False
    there = [(index.folder / name).is_file() and (index.folder / name).stat() for name in names]
    known = zip(there, index.shard_bytes, index.modified_ns, strict=True)
    return all(not stat or (stat.st_size, stat.st_mtime_ns) == (size, modified) for stat, size, modified in known)


def read_index(folder: Path, path: Path) -> ShardIndex:
    """The index saved at `path`, of shards in `folder`.

    Raises ValueError where it is none, or says what its own shards cannot hold: it may be a stranger's.
    """
    from safetensors import SafetensorError, safe_open

    if path.stat().st_size > INDEX_LIMIT_BYTES:
        raise ValueError(f"{path} is larger than {INDEX_LIMIT_BYTES:,} bytes; such an index is not taken")
    try:
        with safe_open(str(path), framework="np") as file:  # holds the header against the file's length
            stored = {key: file.get_slice(key) for key in _DTYPES}
            facts = json.loads((file.metadata() or {}).get("shards", "null"))
            if not isinstance(facts, dict):
                raise ValueError("it does not say of which shards")
            for key, column in stored.items():
                if column.get_dtype() != _STORED[key] or column.get_shape() != [stored["shard"].get_shape()[0]]:
                    raise ValueError(f"{key} is no column of {_STORED[key]}, as long as the others")
            arrays = {key: file.get_tensor(key) for key in _DTYPES}
    except (SafetensorError, ValueError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} is no index ({error}); delete it, or build the shards again") from None
    index = _with_facts(folder, facts, arrays, path)
    _check_rows(index, path)
    return index


def _with_facts(folder: Path, facts: dict[str, Any], arrays: dict[str, np.ndarray], path: Path) -> ShardIndex:
    """The index of these columns; raises ValueError where `facts`, its JSON, are not of their types."""
    names = check_shard_names(facts.get("names"), str(path))
    sizes, times, left_out = facts.get("bytes", []), facts.get("modified_ns", []), facts.get("left_out", {})
    for key, values, lengths in (("bytes", sizes, {len(names)}), ("modified_ns", times, {0, len(names)})):
        if not isinstance(values, list) or len(values) not in lengths or not all(map(is_count, values)):
            raise ValueError(f"{path}: {key} is not a whole number a shard; delete it, or build the shards again")
    if not isinstance(left_out, dict) or not all(map(_is_count_and_first, left_out.values())):
        raise ValueError(f"{path}: left_out is no count by reason; delete it, or build the shards again")
    return ShardIndex(
        folder,
        tuple(names),
        tuple(sizes),
        **arrays,
        has_checksums=facts.get("has_checksums", True) is True,
        modified_ns=tuple(times),
        left_out={reason: (count, first) for reason, (count, first) in left_out.items()},
    )


def _is_count_and_first(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_count(value[0]) and isinstance(value[1], str)


def _check_rows(index: ShardIndex, path: Path) -> None:
    """Raise ValueError that names the first row which is not within its shard, or has no label."""
    known = (index.shard >= 0) & (index.shard < len(index.names))
    ends = np.array(index.shard_bytes, np.int64)[np.where(known, index.shard, 0)]
    inside = (index.offset >= 0) & (index.size >= 0) & (index.offset <= ends - index.size)
    wrong = np.flatnonzero(~(known & inside & (index.size <= MAX_IMAGE_BYTES) & (index.label >= 0)))
    if len(wrong):
        row = {key: int(getattr(index, key)[wrong[0]]) for key in _DTYPES}
        raise ValueError(
            f"{path}: image {wrong[0]} ({row}) is not within its shard, has more than {MAX_IMAGE_BYTES:,} bytes or no "
            "label; delete it, or build the shards again"
        )


def _size_bytes(path: Path) -> int:
    """Of a shard. Raises ValueError where it is no file."""
    if path.is_dir():
        raise ValueError(f"shard {path} is a folder; pack its files into a tar of that name")
    if not path.is_file():
        raise ValueError(f"shard {path} is missing; build it again or take the split out of {INFO_NAME}")
    return path.stat().st_size


def scan_shards(
    folder: Path, names: Sequence[str], *, checksums: bool = False, run: Callable[..., Iterable[Any]] = map
) -> ShardIndex:
    """Build the index by reading each shard's headers and labels, with `checksums` the images too.

    `run` applies a function to many shards, as `map` does. Raises ValueError that names a shard which is cut short or
    damaged.
    """
    found = list(run(functools.partial(scan_shard, checksums=checksums), [folder / name for name in names]))
    rows = [(number, *sample) for number, (_, samples, _) in enumerate(found) for sample in samples]
    columns = np.array(rows, dtype=np.int64).reshape(-1, len(_DTYPES)).T
    arrays = {key: column.astype(dtype) for (key, dtype), column in zip(_DTYPES.items(), columns, strict=True)}
    total: LeftOut = {}
    for _, _, left_out in found:
        for reason, (count, first) in left_out.items():
            leave_out(total, reason, first, count)
    return ShardIndex(
        folder,
        tuple(names),
        tuple(stat.st_size for stat, _, _ in found),
        **arrays,
        has_checksums=checksums,
        modified_ns=() if checksums else tuple(stat.st_mtime_ns for stat, _, _ in found),
        left_out=total,
    )
