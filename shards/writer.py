"""Writes one data set: tar shards that webdataset and timm's ReaderWds read, the index beside them, `_info.json` last.

Each shard is written under a temporary name, synced and renamed; a folder without `_info.json` is unfinished. The
same samples give the same bytes: tar headers carry no time and no user.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.data.index import ShardIndex, index_path, scan_shards
from toolkit.data.info import INFO_NAME

__all__ = ["Sample", "index_split", "write_info", "write_shard", "write_split"]


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
    if not 1 <= num_shards <= len(samples):
        raise ValueError(f"{num_shards} shards for {len(samples)} {split} images; use between 1 and {len(samples)}")
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(num_shards):
        part = samples[number * len(samples) // num_shards : (number + 1) * len(samples) // num_shards]
        name = f"{prefix}-{split}-{number:04d}.tar"
        write_shard(folder / name, part, on_sample)
        names.append(name)
    return index_split(folder, split, scan_shards(folder, names, checksums=True))


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
    """Write one tar under a temporary name, sync it and rename it."""
    import webdataset

    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        with webdataset.TarWriter(file, user="", group="", mtime=0) as tar:
            for sample in samples:
                assert "." not in sample.key, sample.key
                label = sample.label
                meta = sample.meta or {"label": label, "filename": f"{sample.key}.{sample.extension}"}
                tar.write({"__key__": sample.key, sample.extension: sample.content(), "cls": label, "json": meta})
                on_sample()
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_info(folder: Path, name: str, num_classes: int, splits: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Write `_info.json`, the mark of a finished data set, atomically; `facts` are shown in every report."""
    info = {"name": name, "num_classes": num_classes, **facts, "splits": splits}
    temporary = folder / (INFO_NAME + ".tmp")
    temporary.write_text(json.dumps(info, indent=1) + "\n")
    temporary.replace(folder / INFO_NAME)
