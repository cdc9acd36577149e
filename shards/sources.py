"""Where images come from: ILSVRC2012's archives, an ImageFolder tree, or WebDataset shards, without unpacking any.

Whatever the layout, an image is a range of bytes in a file: a member of a tar inside a tar is one too. So the builder
needs no reader of its own for each layout, and any process can read any image.
"""

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit.data.tar import (
    FOREIGN_SUFFIXES,
    FORMAT,
    HIDDEN,
    LINK,
    MAX_IMAGE_BYTES,
    ORPHAN,
    PIL_SUFFIXES,
    LeftOut,
    leave_out,
    tar_members,
)
from toolkit.files import read_json

_EMPTY = "folders without images"
_NO_SPLIT = "folders beside the splits"
_VALIDATION_FOLDERS = ("validation", "val", "valid")
_DEVKIT_BYTES = 2**24  # of a file in the devkit's archive, once unpacked; the larger one has 0.4 MB


@dataclass(frozen=True)
class SourceImage:
    """`size` bytes at `offset` of file `path`; `name` is the original file name, `label` the class number."""

    path: str
    offset: int
    size: int
    name: str
    label: int

    def read(self) -> bytes:
        """The image's bytes. Raises ValueError where the file is shorter than it was, or too large for an image."""
        if self.size > MAX_IMAGE_BYTES:
            raise ValueError(f"{self.name!r} in {self.path} has {self.size:,} bytes, more than an image may have")
        with open(self.path, "rb") as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise ValueError(f"{self.path} is cut short at {self.name}; fetch it again")
        return data


@dataclass(frozen=True)
class Catalogue:
    """All images of a data set: split -> images in a fixed order, and the class names by number.

    `facts` are what the source's `_info.json` says that stays true: whether the images are synthetic, and a note.
    `left_out` counts what else lies there, by split and reason.
    """

    splits: dict[str, list[SourceImage]]
    classes: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)


def from_archives(folder: Path, on_image: Callable[[], None] = lambda: None) -> Catalogue:
    """ILSVRC2012_img_train.tar (a tar of a tar a class), ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz.

    A class's number is the rank of its wnid. The devkit numbers classes otherwise: its id - 1 is not the class.
    """
    paths = {part: folder / f"ILSVRC2012_{part}" for part in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz")}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; all three archives of ILSVRC2012 are needed")
    wnid_of_id, truth = _read_devkit(paths["devkit_t12.tar.gz"])
    left_out: dict[str, LeftOut] = {"train": {}, "validation": {}}
    outer = sorted(tar_members(paths["img_train.tar"], left_out["train"]))
    wnids = sorted(Path(name).stem for name, _, _ in outer)
    rank = {wnid: number for number, wnid in enumerate(wnids)}
    train = []
    for name, offset, length in outer:
        for inner, at, size in tar_members(paths["img_train.tar"], left_out["train"], offset, offset + length):
            train.append(SourceImage(str(paths["img_train.tar"]), at, size, Path(inner).name, rank[Path(name).stem]))
            on_image()
    validation = []
    for name, at, size in sorted(tar_members(paths["img_val.tar"], left_out["validation"])):
        base = Path(name).name
        digits = re.search(r"_(\d+)\.", base)
        number = int(digits.group(1)) if digits else 0
        if not 1 <= number <= len(truth):
            raise ValueError(f"{base} in {paths['img_val.tar']} has no entry among the {len(truth)} of the devkit")
        wnid = wnid_of_id[truth[number - 1]]
        if wnid not in rank:
            raise ValueError(f"{base} is of class {wnid}, which the training archive does not have")
        validation.append(SourceImage(str(paths["img_val.tar"]), at, size, base, rank[wnid]))
        on_image()
    return Catalogue({"train": train, "validation": validation}, wnids, left_out=left_out)


def _read_devkit(path: Path) -> tuple[dict[int, str], list[int]]:
    """(ILSVRC id -> wnid, the id of each validation image)"""
    from scipy.io import loadmat

    found: dict[str, bytes] = {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            name, file = Path(member.name).name, tar.extractfile(member)
            if file is not None and name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
                found[name] = file.read(_DEVKIT_BYTES)
    if len(found) < 2:
        raise ValueError(f"{path} lacks data/meta.mat or data/ILSVRC2012_validation_ground_truth.txt; fetch it again")
    truth = [int(line) for line in found["ILSVRC2012_validation_ground_truth.txt"].split()]
    synsets = loadmat(io.BytesIO(found["meta.mat"]), squeeze_me=True)["synsets"]
    # Classes are the synsets without children; the others are their hypernyms.
    leaves = [synset for synset in synsets.reshape(-1) if int(synset["num_children"]) == 0]
    return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}, truth


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() and not _is_hidden(path) for path in folder.iterdir())


def validation_folder(folder: Path) -> Path | None:
    """Where the images lie that validate: validation/, val/, valid/, or where none is there test/ with classes."""
    found = next((folder / name for name in _VALIDATION_FOLDERS if (folder / name).is_dir()), None)
    return folder / "test" if found is None and _has_classes(folder / "test") else found


def training_folder(folder: Path) -> Path | None:
    """train/, unless it is a class of that name: pictures alone, and nothing beside it that validates."""
    train = folder / "train"
    return train if train.is_dir() and (validation_folder(folder) or _has_classes(train)) else None


def from_image_folder(folder: Path, on_image: Callable[[], None] = lambda: None) -> Catalogue:
    """<folder>/train/<class>/* and those of `validation_folder`; test/<class>/* beside both is a split of its own."""
    validation, test = validation_folder(folder), folder / "test"
    if validation is None or not (folder / "train").is_dir():
        raise ValueError(f"{folder} lacks train/ and val/ (or validation/, test/) with a folder for each class")
    folders = {"train": folder / "train", "validation": validation}
    if validation != test and _has_classes(test):
        folders["test"] = test
    catalogue = from_split_folders(folder, folders, on_image)
    return replace(catalogue, facts={"note": "its test/ validates here"} if validation == test else {})


def from_split_folders(
    folder: Path, folders: Mapping[str, Path], on_image: Callable[[], None] = lambda: None
) -> Catalogue:
    """The class folders of each split's folder below `folder`; what lies beside these is counted."""
    catalogue = from_class_folders(folders, on_image)
    for path in sorted({*folder.iterdir()} - {*folders.values()}):  # such as a test/ whose classes are not known
        reason = HIDDEN if _is_hidden(path) else _NO_SPLIT if path.is_dir() else _reason(path)
        leave_out(catalogue.left_out["train"], reason, str(path))
    return catalogue


def from_class_folders(folders: Mapping[str, Path], on_image: Callable[[], None] = lambda: None) -> Catalogue:
    """<folder>/<class>/* of each split; classes are the training split's, which comes first, in sorted order."""
    splits: dict[str, list[SourceImage]] = {split: [] for split in folders}
    left_out: dict[str, LeftOut] = {split: {} for split in folders}
    classes: dict[str, int] = {}
    for split, folder in folders.items():
        for entry in sorted(folder.iterdir()):
            found = list(_files(entry, left_out[split])) if entry.is_dir() and not _is_hidden(entry) else []
            if found and split == "train":
                classes[entry.name] = len(classes)
            elif found and entry.name not in classes:
                raise ValueError(f"{folder} has class {entry.name!r}, of which {folders['train'].name}/ has no images")
            elif not found:
                hidden, kind = _is_hidden(entry), _EMPTY if entry.is_dir() else _reason(entry)
                leave_out(left_out[split], HIDDEN if hidden else kind, str(entry))
            for path in found:
                size = path.stat().st_size
                splits[split].append(SourceImage(str(path), 0, size, path.name, classes[entry.name]))
                on_image()
        if not splits[split]:
            count = sum(_suffix(path) in PIL_SUFFIXES for path in folder.iterdir())
            flat = f", but {count:,} directly in it, whose classes are not known" if count else ""
            raise ValueError(
                f"{folder} has no images in class folders{flat}; move each image into {folder.name}/<class>/, for "
                "ImageNet's validation images give a folder with the archives instead"
            )
    return Catalogue(splits, list(classes), left_out=left_out)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in ("__MACOSX", "__pycache__")


def _suffix(path: Path) -> str:
    return path.suffix[1:].lower()


def _reason(path: Path) -> str:
    """Why a file that is no image in a class folder is left out."""
    if path.is_symlink() and not path.is_file():
        return LINK
    return FORMAT if _suffix(path) in FOREIGN_SUFFIXES else ORPHAN


def _files(folder: Path, left_out: LeftOut) -> Iterator[Path]:
    """The images below a folder, in sorted order, without hidden ones and those behind links to folders."""
    for path in sorted(folder.rglob("*")):
        hidden = any(_is_hidden(folder / part) for part in path.relative_to(folder).parts)
        if not hidden and path.is_file() and _suffix(path) in PIL_SUFFIXES:
            yield path
        elif path.is_symlink() or not path.is_dir():
            leave_out(left_out, HIDDEN if hidden else _reason(path), str(path))


def from_shards(folder: Path, on_image: Callable[[], None] = lambda: None) -> Catalogue:
    """WebDataset shards with jpg (or jpeg, png, webp) and cls: of ours, or as in timm/imagenet-1k-wds."""
    from toolkit.data.index import load_split
    from toolkit.data.info import INFO_NAME, read_info

    info = read_info(folder)
    splits: dict[str, list[SourceImage]] = {}
    left_out: dict[str, LeftOut] = {}
    for wanted, names in (("train", ("train",)), ("validation", _VALIDATION_FOLDERS)):
        found = next((name for name in names if name in info["splits"]), None)
        if found is None:
            raise ValueError(f"{folder / INFO_NAME} has no {wanted} split; it has {', '.join(info['splits'])}")
        index = load_split(folder, found)
        splits[wanted], left_out[wanted] = [], index.left_out
        for shard, path in enumerate(folder / name for name in index.names):
            file_names = {offset: Path(member).name for member, offset, _ in tar_members(path, {})}
            for row in (index.shard == shard).nonzero()[0].tolist():
                offset, size, label = (int(column[row]) for column in (index.offset, index.size, index.label))
                if offset not in file_names:
                    raise ValueError(f"{path} has no file at byte {offset}, its index says one; build the shards again")
                splits[wanted].append(SourceImage(str(path), offset, size, file_names[offset], label))
                on_image()
    count = max(max((image.label for image in images), default=-1) for images in splits.values()) + 1
    file = folder / "classes.json"
    classes = read_json(file) if file.is_file() else []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{file} is no list of class names; delete it, or build the shards again")
    classes = classes or [str(number) for number in range(info.get("num_classes") or count)]
    if count > len(classes):
        raise ValueError(f"{folder} has label {count - 1}, but {len(classes)} classes; build the shards again")
    facts: dict[str, Any] = {key: info[key] for key in ("synthetic", "note") if key in info}
    return Catalogue(splits, classes, facts, left_out)
