"""Where every sample lies: shard, byte offset, size, label and checksum, read once and kept beside the shards.

With the index a sample is one `pread`, the order is free to be any permutation, and a truncated or missing shard is
an error at start, not a silent loss (webdataset's reader drops the rest of a shard cut at a member border).
"""

import functools
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["INFO_NAME", "ShardIndex", "index_path", "load_split", "read_info", "scan_shards"]

INFO_NAME = "_info.json"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_DTYPES = {"shard": np.int32, "offset": np.int64, "size": np.int32, "label": np.int32, "crc32": np.uint32}


@dataclass(frozen=True)
class ShardIndex:
    """One row per sample, in shard order: shard number, offset and size in bytes of the image, label, crc32 of it.

    `folder` holds the files `names`, of `shard_bytes` bytes each.
    """

    folder: Path
    names: tuple[str, ...]
    shard_bytes: tuple[int, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    crc32: np.ndarray

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

    def save(self, path: Path) -> None:
        """Write atomically; the same rows give the same bytes."""
        from safetensors.numpy import save

        arrays = {key: np.ascontiguousarray(getattr(self, key)) for key in _DTYPES}
        # One metadata entry only: safetensors writes several in random order.
        shards = json.dumps({"schema": "shard-index/1", "names": self.names, "bytes": self.shard_bytes})
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # ranks may scan at once
        temporary.write_bytes(save(arrays, metadata={"shards": shards}))
        temporary.replace(path)


def index_path(folder: Path, split: str) -> Path:
    """File of a split's index."""
    return folder / f"{split}.index.safetensors"


def read_info(folder: str | Path) -> dict[str, Any]:
    """The folder's `_info.json`, as timm's ReaderWds reads it. Raises ValueError where it is missing or broken."""
    if not folder:
        raise ValueError("--data-dir is missing; name a folder of shards (python -m shards.digits makes one)")
    path = Path(folder) / INFO_NAME
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"--data-dir {folder} has no {INFO_NAME}; make shards first: python -m shards.digits --out {folder}"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); build the shards again") from None
    if not isinstance(info.get("splits"), dict):
        raise ValueError(f"{path} has no splits; expected the layout of timm's ReaderWds")
    return info


def load_split(folder: Path, split: str) -> ShardIndex:
    """Open a split: its index, made by one scan of the shards where there is none, checked against the files."""
    info = read_info(folder)
    if split not in info["splits"]:
        raise ValueError(f"split {split!r} is not in {folder / INFO_NAME}; it has {', '.join(info['splits'])}")
    path = index_path(folder, split)
    if path.is_file():
        index = _read(folder, path)
    else:
        index = scan_shards(folder, info["splits"][split]["filenames"])
        if os.access(folder, os.W_OK):
            index.save(path)
    index.check_files()
    expected = info["splits"][split].get("num_samples", len(index))
    if len(index) != expected:
        raise ValueError(
            f"split {split!r} has {len(index)} samples, {folder / INFO_NAME} says {expected}; a shard was cut short, "
            "build or copy it again"
        )
    return index


def _read(folder: Path, path: Path) -> ShardIndex:
    from safetensors import safe_open

    with safe_open(str(path), framework="np") as file:
        shards = json.loads(file.metadata()["shards"])
        arrays = {key: file.get_tensor(key) for key in _DTYPES}
    return ShardIndex(folder, tuple(shards["names"]), tuple(shards["bytes"]), **arrays)


def scan_shards(folder: Path, names: Sequence[str]) -> ShardIndex:
    """Build the index by reading each shard's headers, labels and image checksums."""
    rows: list[tuple[int, int, int, int, int]] = []
    for number, name in enumerate(names):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"shard {path} is missing; build it again or take the split out of {INFO_NAME}")
        rows += [(number, *sample) for sample in _scan_shard(path)]
    columns = np.array(rows, dtype=np.int64).reshape(-1, len(_DTYPES)).T
    arrays = {key: column.astype(dtype) for (key, dtype), column in zip(_DTYPES.items(), columns, strict=True)}
    return ShardIndex(folder, tuple(names), tuple((folder / n).stat().st_size for n in names), **arrays)


def _scan_shard(path: Path) -> list[tuple[int, int, int, int]]:
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
                if suffix.lower() not in (*IMAGE_SUFFIXES, "cls"):
                    continue
                data = tar.extractfile(member)
                assert data is not None, member.name
                content = data.read()
                if suffix.lower() == "cls":
                    labels[key] = int(content)
                else:
                    images[key] = (member.offset_data, member.size, zlib.crc32(content))
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"shard {path} cannot be read ({error}); build or copy it again") from None
    unpaired = sorted(images.keys() ^ labels.keys())
    if unpaired:
        raise ValueError(f"shard {path}: sample {unpaired[0]!r} lacks its image or its .cls; build it again")
    return [(offset, size, labels[key], crc) for key, (offset, size, crc) in images.items()]
