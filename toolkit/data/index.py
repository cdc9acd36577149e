"""Where every sample lies: shard, byte offset, size, label and checksum, read once and kept beside the shards.

With the index a sample is one `pread`, the order is free to be any permutation, and a truncated or missing shard is
an error at start, not a silent loss (webdataset's reader drops the rest of a shard cut at a member border).
"""

import functools
import hashlib
import json
import multiprocessing
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.files import cache_folder, locked, write_atomically
from toolkit.log import get_logger

__all__ = [
    "INFO_NAME",
    "ShardIndex",
    "check_count",
    "index_path",
    "load_split",
    "read_index",
    "read_info",
    "scan_shards",
    "split_entry",
]

INFO_NAME = "_info.json"
_SCAN_ALONE = 16  # shards that one process scans; more are shared by several
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_DTYPES = {"shard": np.int32, "offset": np.int64, "size": np.int32, "label": np.int32, "crc32": np.uint32}


@dataclass(frozen=True)
class ShardIndex:
    """One row per sample, in shard order: shard number, offset and size in bytes of the image, label, crc32 of it.

    `folder` holds the files `names`, of `shard_bytes` bytes each. An index made by a scan of headers has no checksums
    (crc32 is 0), and in `modified_ns` the times at which the shards it read had last been changed.
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

    def __len__(self) -> int:
        return len(self.shard)

    @functools.cached_property
    def shard_lengths(self) -> list[int]:
        """Samples in each shard."""
        return np.bincount(self.shard, minlength=len(self.names)).tolist()

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over shard names, sizes, lengths, labels and image checksums: what a resumed run must find again."""
        digest = hashlib.sha256(json.dumps([self.names, self.shard_bytes, self.shard_lengths]).encode())
        digest.update(self.label.tobytes())
        digest.update(self.crc32.tobytes())
        return digest.hexdigest()

    @staticmethod
    def joined(parts: "Sequence[ShardIndex]") -> "ShardIndex":
        """One index of several, whose shards follow each other."""
        starts = np.cumsum([0, *(len(part.names) for part in parts)])
        columns = {key: np.concatenate([getattr(part, key) for part in parts]) for key in _DTYPES if key != "shard"}
        shard = [part.shard + start for part, start in zip(parts, starts, strict=False)]
        return ShardIndex(
            parts[0].folder,
            sum((part.names for part in parts), ()),
            sum((part.shard_bytes for part in parts), ()),
            shard=np.concatenate(shard).astype(np.int32),
            **columns,
            has_checksums=all(part.has_checksums for part in parts),
            modified_ns=sum((part.modified_ns for part in parts), ()),
        )

    def check_files(self) -> None:
        """Raise ValueError that names the first shard that is missing or has another size than the index says."""
        for name, expected in zip(self.names, self.shard_bytes, strict=True):
            path = self.folder / name
            if not path.is_file():
                raise ValueError(f"shard {path} is missing; build it again or take the split out of {INFO_NAME}")
            actual = path.stat().st_size
            if actual != expected:
                raise ValueError(
                    f"shard {path} has {actual} bytes, its index says {expected}; copy it again, or delete "
                    "the *.index.safetensors beside it if the shard was replaced on purpose"
                )

    def save(self, path: Path) -> str:
        """Write atomically; the same rows give the same bytes. Returns their sha256."""
        from safetensors.numpy import save

        arrays = {key: np.ascontiguousarray(getattr(self, key)) for key in _DTYPES}
        # One metadata entry only: safetensors writes several in random order.
        facts: dict[str, Any] = {"schema": "shard-index/1", "names": self.names, "bytes": self.shard_bytes}
        if not self.has_checksums:
            facts |= {"has_checksums": False, "modified_ns": self.modified_ns}
        shards = json.dumps(facts)
        content = save(arrays, metadata={"shards": shards})
        write_atomically(path, content)
        return hashlib.sha256(content).hexdigest()


def index_path(folder: Path, split: str) -> Path:
    """File of a split's index."""
    return folder / f"{split}.index.safetensors"


def read_info(folder: str | Path) -> dict[str, Any]:
    """The folder's `_info.json`, as timm's ReaderWds reads it, or one made up from the names of its shards.

    Raises ValueError where there are neither, or where it is broken.
    """
    if not folder:
        raise ValueError("--data-dir is missing; name a folder of shards (python -m shards.digits makes one)")
    path = Path(folder) / INFO_NAME
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        return _info_from_names(Path(folder))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); build the shards again") from None
    if not isinstance(info.get("splits"), dict):
        raise ValueError(f"{path} has no splits; expected the layout of timm's ReaderWds")
    return info


def _info_from_names(folder: Path) -> dict[str, Any]:
    """Splits by the words train and val in the shards' names."""
    splits: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.tar")):
        words = path.stem.lower()
        split = "train" if "train" in words else "validation" if "val" in words else "test" if "test" in words else ""
        if split:
            splits.setdefault(split, {"name": split, "filenames": []})["filenames"].append(path.name)
    if not splits:
        raise ValueError(
            f"--data-dir {folder} has no {INFO_NAME} and no shards named *train*.tar and *val*.tar; "
            f"make some first: python -m shards.digits --out {folder}"
        )
    return {"name": folder.name, "splits": splits}


def load_split(folder: Path, split: str) -> ShardIndex:
    """Open a split: its index, made by one scan of the shards' headers where there is none, checked against the files.

    A scanned index is kept beside the shards, or in a cache folder where that cannot be written to, and made again when
    a shard has changed. One that was built with the shards is never: a shard that differs from it is an error.
    """
    entry = split_entry(read_info(folder), split, str(folder))
    names = entry["filenames"]
    index = _current(folder, split, names)
    if index is None:
        path = _own_path(folder, split)
        with locked(path):  # the other ranks wait for the scan of the first
            index = _current(folder, split, names)
            if index is None:
                get_logger().info("reading the headers of %d shards in %s", len(names), folder)
                index = scan_shards(folder, names, run=_in_processes if len(names) > _SCAN_ALONE else map)
                index.save(path)
    index.check_files()
    check_count(index, entry, str(folder))
    return index


def split_entry(info: dict[str, Any], split: str, place: str) -> dict[str, Any]:
    """A split's entry of `_info.json`. Raises ValueError that lists the splits where it has none."""
    if split not in info["splits"]:
        raise ValueError(f"split {split!r} is not in {INFO_NAME} of {place}; it has {', '.join(info['splits'])}")
    return dict(info["splits"][split])


def check_count(index: ShardIndex, entry: dict[str, Any], place: str) -> None:
    """Raise ValueError where a split has another number of samples than its `_info.json` says."""
    expected = entry.get("num_samples", len(index))
    if len(index) != expected:
        raise ValueError(
            f"split {entry['name']!r} has {len(index)} samples, {INFO_NAME} of {place} says {expected}; a shard was "
            "cut short, build or copy it again"
        )


def _own_path(folder: Path, split: str) -> Path:
    """Where an index that is scanned is kept."""
    return index_path(folder, split) if os.access(folder, os.W_OK) else _cached_path(folder, split)


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
    for name, known in zip(names, zip(index.shard_bytes, index.modified_ns, strict=True), strict=True):
        shard = index.folder / name
        if shard.is_file() and (shard.stat().st_size, shard.stat().st_mtime_ns) != known:
            return False
    return True


def read_index(folder: Path, path: Path) -> ShardIndex:
    """The index saved at `path`, of shards in `folder`."""
    from safetensors import safe_open

    with safe_open(str(path), framework="np") as file:
        shards = json.loads(file.metadata()["shards"])
        arrays = {key: file.get_tensor(key) for key in _DTYPES}
    return ShardIndex(
        folder,
        tuple(shards["names"]),
        tuple(shards["bytes"]),
        **arrays,
        has_checksums=shards.get("has_checksums", True),
        modified_ns=tuple(shards.get("modified_ns", ())),
    )


def _in_processes(function: Any, *iterables: Any) -> Iterator[Any]:
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(function, *iterables)


def scan_shards(
    folder: Path, names: Sequence[str], *, checksums: bool = False, run: Callable[..., Iterable[Any]] = map
) -> ShardIndex:
    """Build the index by reading each shard's headers and labels, with `checksums` the images too.

    `run` applies a function to many shards, as `map` does. Raises ValueError that names a shard which is missing, cut
    short or damaged.
    """
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"shard {path} is missing; build it again or take the split out of {INFO_NAME}")
    stats = [path.stat() for path in paths]
    found = run(functools.partial(_scan_shard, checksums=checksums), paths)
    rows = [(number, *sample) for number, samples in enumerate(found) for sample in samples]
    columns = np.array(rows, dtype=np.int64).reshape(-1, len(_DTYPES)).T
    arrays = {key: column.astype(dtype) for (key, dtype), column in zip(_DTYPES.items(), columns, strict=True)}
    return ShardIndex(
        folder,
        tuple(names),
        tuple(stat.st_size for stat in stats),
        **arrays,
        has_checksums=checksums,
        modified_ns=() if checksums else tuple(stat.st_mtime_ns for stat in stats),
    )


def _scan_shard(path: Path, checksums: bool) -> list[tuple[int, int, int, int]]:
    """(offset, size, label, crc32) of each sample. Keys end at the first dot, as in webdataset."""
    images: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                key, _, suffix = base.partition(".")
                key = f"{folder}/{key}"
                if suffix.lower() == "cls":
                    labels[key] = int(_content(tar, member))
                elif suffix.lower() in IMAGE_SUFFIXES:
                    crc = zlib.crc32(_content(tar, member)) if checksums else 0
                    images[key] = (member.offset_data, member.size, crc)
            end = tar.offset
        with open(path, "rb") as file:
            # tarfile takes a file that ends after a member for a whole tar; a whole one ends with empty blocks.
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it is cut short: the end mark is missing")
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"shard {path} cannot be read ({error}); build or copy it again") from None
    unpaired = sorted(images.keys() ^ labels.keys())
    if unpaired:
        raise ValueError(f"shard {path}: sample {unpaired[0]!r} lacks its image or its .cls; build it again")
    return [(offset, size, labels[key], crc) for key, (offset, size, crc) in images.items()]


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, member.name
    data = file.read()
    if len(data) != member.size:
        raise ValueError(f"it is cut short in {member.name}")
    return data
