"""Writes one data set: tar shards that webdataset and timm's ReaderWds read, the index beside them, `_info.json` last.

Each shard is written under a temporary name, synced and renamed; a folder without `_info.json` is unfinished. The
same samples give the same bytes: tar headers carry no time and no user.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from toolkit.data.index import ShardIndex, index_path, scan_shards
from toolkit.data.info import INFO_NAME
from toolkit.files import replacing, write_json
from toolkit.progress import Progress

Row = TypeVar("Row")


@dataclass(frozen=True)
class Sample:
    """One image to write: key without dots, class number, and a function that gives the file's bytes when needed.

    `extension` says what they are, jpg or png. `meta` becomes the sample's .json; None writes its label and a file name
    made of the key.
    """

    key: str
    label: int
    content: Callable[[], bytes]
    meta: dict[str, Any] | None = None
    extension: str = "jpg"


def encoded(image: Any, kind: str, **options: Any) -> bytes:
    """A PIL image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_data_set(
    folder: Path, name: str, num_classes: int, splits: Mapping[str, tuple[Sequence[Sample], int]], **facts: Any
) -> None:
    """Write splits of (samples, number of shards), saying how far it is; see `write_split` and `write_info`.

    Raises ValueError, before anything is touched, for fewer samples than shards.
    """
    prefix = name.partition("-")[0]
    for split, (samples, num_shards) in splits.items():
        shard_parts(prefix, split, samples, num_shards)
    for stale in (folder / INFO_NAME, *(index_path(folder, split) for split in splits)):
        stale.unlink(missing_ok=True)  # while shards are replaced, or if this stops: a reader would take its counts
    with Progress(sum(len(samples) for samples, _ in splits.values()), "images", name) as progress:
        entries = {
            split: write_split(folder, split, prefix, samples, num_shards, progress.advance)
            for split, (samples, num_shards) in splits.items()
        }
    write_info(folder, name, num_classes, entries, **facts)


def write_split(
    folder: Path,
    split: str,
    prefix: str,
    samples: Sequence[Sample],
    num_shards: int,
    on_sample: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write `samples` in the order given over `num_shards` shards of nearly equal length, and their index.

    Returns the split's entry for `_info.json`. Raises ValueError for fewer samples than shards.
    """
    parts = shard_parts(prefix, split, samples, num_shards)
    for name, part in parts.items():
        write_shard(folder / name, part, on_sample)
    return index_split(folder, split, scan_shards(folder, list(parts), checksums=True))


def shard_parts(prefix: str, split: str, rows: Sequence[Row], num_shards: int) -> dict[str, Sequence[Row]]:
    """File name -> its part of the rows, in order and of nearly equal length. Raises ValueError for too many shards."""
    if not 1 <= num_shards <= len(rows):
        raise ValueError(f"{num_shards} shards for {len(rows)} {split} images; use between 1 and {len(rows)}")
    cuts = [number * len(rows) // num_shards for number in range(num_shards + 1)]
    return {f"{prefix}-{split}-{n:04d}.tar": rows[cuts[n] : cuts[n + 1]] for n in range(num_shards)}


def index_split(folder: Path, split: str, index: ShardIndex) -> dict[str, Any]:
    """Save a split's index; returns the split's entry for `_info.json`."""
    return {
        "name": split,
        "num_samples": len(index),
        "filenames": list(index.names),
        "shard_lengths": index.shard_lengths,
        "index_sha256": index.save(index_path(folder, split)),
    }


def write_shard(path: Path, samples: Iterable[Sample], on_sample: Callable[[], None] = lambda: None) -> None:
    """Write one tar under a temporary name, sync it and rename it; a sample's members stand in order of their names."""
    with replacing(path, sync=True) as temporary, tarfile.open(temporary, "w") as tar:
        for sample in samples:
            assert "." not in sample.key, sample.key
            meta = sample.meta or {"label": sample.label, "filename": f"{sample.key}.{sample.extension}"}
            label, about = str(sample.label).encode(), json.dumps(meta).encode()
            for suffix, data in sorted({sample.extension: sample.content(), "cls": label, "json": about}.items()):
                member = tarfile.TarInfo(f"{sample.key}.{suffix}")  # without time and user of itself
                member.size, member.mode = len(data), 0o444
                tar.addfile(member, io.BytesIO(data))
            on_sample()


def write_info(folder: Path, name: str, num_classes: int, splits: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Write `_info.json`, the mark of a finished data set, atomically; `facts` are shown in every report."""
    write_json(folder / INFO_NAME, {"name": name, "num_classes": num_classes, **facts, "splits": splits}, indent=1)
