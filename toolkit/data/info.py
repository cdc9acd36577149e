"""A data set's `_info.json`: its splits, and the shards of each. It may be a stranger's: all of it is checked here."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.data.tar import PIL_SUFFIXES, UNPACK
from toolkit.files import check_name, read_json
from toolkit.log import get_logger

INFO_NAME = "_info.json"
_INFO_NAMES = (INFO_NAME, "info.json")  # timm takes both, in this order
_DELETE = "write it so, or delete the file: splits are then seen from the shards' names"
_COMPRESSED = re.compile(r"\.(tgz|tar\.(gz|bz2|xz|zst))$", re.IGNORECASE)
# A classifier is made of that many rows before the first image is read: 2,048 channels × 2**20 classes are 8 GiB.
MAX_CLASSES = 2**20


def read_info(folder: str | Path) -> dict[str, Any]:
    """The folder's `_info.json` or `info.json`, as timm's ReaderWds reads it, or one made up from its shards' names.

    Each split's entry has its `name` and at least one of `filenames`. Raises ValueError where there are neither, or
    where it is broken.
    """
    if not folder:
        raise ValueError("--data-dir is missing; name a folder of shards (python -m shards.digits makes one)")
    if Path(folder).is_file():
        raise ValueError(f"--data-dir {folder} is a file; name the folder in which the shards lie")
    for name in _INFO_NAMES:
        if (path := Path(folder) / name).exists():
            return _checked(read_json(path), path)
    return _checked(_info_from_names(Path(folder)), folder)


def _info_from_names(folder: Path) -> dict[str, Any]:
    """Splits by the words train and val in the shards' names."""
    splits: dict[str, dict[str, Any]] = {}
    compressed = sorted(path for path in folder.glob("*") if _COMPRESSED.search(path.name))
    if compressed:
        raise ValueError(f"shard {compressed[0]} is compressed, one of {len(compressed)}; {UNPACK}")
    for path in sorted(folder.glob("*.tar")):
        words = path.stem.lower()
        split = "train" if "train" in words else "validation" if "val" in words else "test" if "test" in words else ""
        if split:
            splits.setdefault(split, {"filenames": []})["filenames"].append(path.name)
        else:
            get_logger().warning("left out %s: neither train, val nor test is in its name", path)
    if not splits:
        pictures = next(_pictures(folder), None)
        if pictures is not None:
            splits_there = ("val", "valid", "validation", "test/*")  # a test/ without classes is none
            divided = any(path.is_dir() for name in splits_there for path in folder.glob(name))
            raise ValueError(
                f"--data-dir {folder} is a folder of pictures ({pictures.name}); make shards of it first: "
                f"python -m shards.image_folder --source {shlex.quote(str(folder))} "
                f"--out {shlex.quote(f'{folder.resolve().name}-shards')}{'' if divided else ' --val-share 0.1'}"
            )
        raise ValueError(
            f"--data-dir {folder} has no {INFO_NAME} and no shards named *train*.tar and *val*.tar; "
            "make some first: python -m shards.digits (--hard for digits-hard), others as docs/data.md says"
        )
    return {"name": folder.name, "splits": splits}


def _pictures(folder: Path) -> Iterator[Path]:
    """Pictures in class folders, alone or below those of splits."""
    paths = (path for pattern in ("*/*", "*/*/*") for path in folder.glob(pattern))
    return (path for path in paths if path.suffix[1:].lower() in PIL_SUFFIXES)


def _checked(info: Any, place: Path | str) -> dict[str, Any]:
    """`info` with every value that is read anywhere of its type, and every name a safe one. Raises ValueError."""
    if not isinstance(info, dict) or not isinstance(info.get("splits"), dict):
        raise ValueError(f"{place} has no splits; expected the layout of timm's ReaderWds; {_DELETE}")
    for key in ("name", "note"):
        if not isinstance(info.get(key, ""), str):
            raise ValueError(f"{place}: {key} {info[key]!r:.200} is no text; build the shards again")
    classes = info.get("num_classes", 1)
    if not is_count(classes) or not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"{place}: num_classes {classes!r:.200} is no number from 1 to {MAX_CLASSES:,}")
    return {**info, "splits": {split: _checked_split(split, entry, place) for split, entry in info["splits"].items()}}


def _checked_split(split: str, entry: Any, place: Path | str) -> dict[str, Any]:
    where = f"{place}: split {split!r:.200}"
    if "/" in check_name(split, f"{place}: split"):  # it becomes a part of file names
        raise ValueError(f"{where} has a slash in its name; rename it")
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no mapping of name, num_samples and filenames; {_DELETE}")
    check_shard_names(entry.get("filenames"), where)
    samples, sha256 = entry.get("num_samples", 0), entry.get("index_sha256")
    if not is_count(samples):
        raise ValueError(f"{where}: num_samples {samples!r:.200} is no number of images; build the shards again")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise ValueError(f"{where}: index_sha256 {sha256!r:.200} is no SHA-256; build the shards again")
    return {**entry, "name": split}


def check_shard_names(names: Any, where: str) -> list[str]:
    """`names`; raises ValueError unless they are a list of at least one safe file name."""
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where} does not list the names of its shards; build the shards again")
    return [check_name(name, f"{where}: shard") for name in names]


def is_count(value: Any) -> bool:
    """Whether it is a whole number that an int64 holds: neither true nor 1.0."""
    return type(value) is int and 0 <= value < 2**63


def split_entry(info: dict[str, Any], split: str, place: str) -> dict[str, Any]:
    """A split's entry of `_info.json`. Raises ValueError that lists the splits where it has none."""
    if split not in info["splits"]:
        raise ValueError(f"split {split!r} is not in {INFO_NAME} of {place}; it has {', '.join(info['splits'])}")
    return dict(info["splits"][split])
