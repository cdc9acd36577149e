"""Reads the headers of tars that may be a stranger's: what they claim is held against the file before it counts."""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from toolkit.files import UnsafeNameError, check_name

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")  # in timm's order: the first that a sample has is read
PIL_SUFFIXES = (*IMAGE_SUFFIXES, "jpe", "jfif", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
FOREIGN_SUFFIXES = ("heic", "heif", "avif", "jxl", "jp2", "j2k", "tga", "psd", "svg", "eps", "dng")
MAX_IMAGE_BYTES = 2**28  # read in one piece; the largest photographs have a fifth of it
MAX_LABEL = 2**31 - 1  # labels are kept as int32
_LABEL_BYTES = 64  # a number and white space
_NUMBER = re.compile(rb"\s*\+?[0-9]+\s*")  # int() takes 1_0 for ten
_PIECE_BYTES = 2**20
_HEADER_BYTES = 2**16  # of a long name or extended attributes, which tarfile reads in one piece

UNPACK = "unpack it to a .tar (gunzip; its images are compressed already, and are read from any place in it)"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Why something in a data set is not read. These are images, or may be:
DOTTED = "images under a key with a dot (a key ends at the first dot)"
FORMAT = "images of a format that is not read there"
LINK = "links and other members that are no files"
# And these are none, or belong to an image that is read:
SECOND = "further images of samples that are read"
ORPHAN = "files of no sample"
HIDDEN = "hidden files and folders"
LOST = (DOTTED, FORMAT, LINK)

LeftOut = dict[str, tuple[int, str]]
"""Reason -> (how many, the first of them)."""


def leave_out(left_out: LeftOut, reason: str, name: str, count: int = 1) -> None:
    """Count what is not read."""
    known, first = left_out.get(reason, (0, name))
    left_out[reason] = known + count, first


class Member(NamedTuple):
    """A file in a tar: its data are `size` bytes at `offset` of the file that holds the tar."""

    name: str
    offset: int
    size: int


class _Headers:
    """A file as tarfile sees it: it reads small pieces forwards, whatever sizes, negative ones too, a header claims."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file = file
        self._end = end
        self.tell = file.tell

    def seek(self, place: int) -> int:
        if not self.tell() - 1 <= place <= self._end:  # tarfile looks at the byte before
            raise tarfile.ReadError(f"a header at {self.tell()} says that the next is at {place}")
        return self._file.seek(place)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header at {self.tell()} claims {size} bytes more of header")
        return self._file.read(size)


def tar_members(path: Path, left_out: LeftOut, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The files of the tar that lies in `path` from `start` to `end` (its last byte); their data lie between these.

    Members that are neither files nor folders, such as links, are counted in `left_out`. Raises ValueError for a tar
    that is damaged, cut short, claims what it has not, or has data after its end mark.
    """
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size if end is None else end
        first = os.pread(file.fileno(), 8, start)
        for magic, kind in _COMPRESSED.items():
            if first.startswith(magic):
                raise ValueError(f"{path} is compressed with {kind}; {UNPACK}")
        file.seek(start)
        try:
            tar = tarfile.open(fileobj=_Headers(file, end), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
            while (member := tar.next()) is not None:
                tar.members = []  # else it keeps 1 GB of headers for ImageNet
                if not member.isfile():
                    if not member.isdir():
                        leave_out(left_out, LINK, f"{member.name!r:.200} in {path.name}")
                    continue
                check_name(member.name, f"{path}: member", dash=True)  # no command sees it
                if member.issparse():
                    raise ValueError(f"{member.name!r} is stored with holes")
                if not 0 <= member.size <= end - member.offset_data:
                    raise ValueError(f"{member.name!r} claims {member.size} bytes, the file has less: it is cut short")
                yield Member(member.name, member.offset_data, member.size)
            # tarfile takes a file that ends after a member for a whole tar; a whole one ends with empty blocks.
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it is cut short: the end mark is missing")
            _check_rest(file, tar.offset, end)
        except UnsafeNameError:
            raise
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is no whole tar ({error}); build or copy it again") from None


def _check_rest(file: BinaryIO, place: int, end: int) -> None:
    """Raise ValueError for anything but zeros after the end mark, where no reader of tars looks."""
    while place < end:
        piece = os.pread(file.fileno(), min(_PIECE_BYTES, end - place), place)
        if piece.count(0) != len(piece):
            raise ValueError(f"data follow its end mark at byte {place}, as when tars are joined; join with tar -A")
        place += len(piece) or _PIECE_BYTES


@dataclass
class _Shard:
    """Members by key, each image, label and other file put where it belongs.

    A sample is its images by suffix and, under "cls", its class number.
    """

    path: Path
    left_out: LeftOut = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _dotted: list[tuple[str, str]] = field(default_factory=list)  # (key, name)
    _dotted_labels: set[str] = field(default_factory=set)
    _others: dict[str, str] = field(default_factory=dict)  # key -> name
    _foreign: set[str] = field(default_factory=set)  # keys with an image of a format that is not read

    def add(self, file: BinaryIO, member: Member) -> None:
        folder, _, base = member.name.rpartition("/")
        start, _, suffix = base.partition(".")
        key, suffix = f"{folder}/{start}".removeprefix("/"), suffix.lower()
        last = suffix.rpartition(".")[2]
        if not start:
            self.leave_out(HIDDEN, member.name)
        elif suffix == "cls":
            self._put(key, suffix, _label(file, member, self.path))
        elif suffix in IMAGE_SUFFIXES:
            if member.size > MAX_IMAGE_BYTES:
                raise ValueError(
                    f"shard {self.path}: {member.name!r} has {member.size:,} bytes, more than the {MAX_IMAGE_BYTES:,} "
                    "that an image may have; take it out"
                )
            self._put(key, suffix, member)
        elif "." in suffix and last in (*PIL_SUFFIXES, *FOREIGN_SUFFIXES):
            self._dotted.append((key, member.name))
        elif suffix in (*PIL_SUFFIXES, *FOREIGN_SUFFIXES):
            self.leave_out(FORMAT, member.name)
            self._foreign.add(key)
        else:
            if last == "cls":
                self._dotted_labels.add(member.name.rpartition(".")[0])
            self._others.setdefault(key, member.name)

    def leave_out(self, reason: str, name: str) -> None:
        leave_out(self.left_out, reason, f"{name!r:.200} in {self.path.name}")

    def _put(self, key: str, suffix: str, content: Member | int) -> None:
        """Into the last sample of this key, or a new one where that has such a member already: a key may come again."""
        samples = self.samples.setdefault(key, [{}])
        if suffix in samples[-1]:
            samples.append({})
        samples[-1][suffix] = content

    def finish(self) -> list[tuple[int, int, int]]:
        """(offset, size, label) of each sample, as they lie; what is not read is counted."""
        rows = []
        for key, sample in ((key, sample) for key, samples in self.samples.items() for sample in samples):
            images = [sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample]
            if not images and key in self._foreign:  # its image is counted already
                continue
            if not images or "cls" not in sample:
                raise ValueError(f"shard {self.path}: sample {key!r} lacks its image or its .cls; build it again")
            rows.append((images[0].offset, images[0].size, sample["cls"]))
            for image in images[1:]:
                self.leave_out(SECOND, image.name)
        for key, name in self._dotted:
            # `key.mask.png` beside `key.jpg` is a part of that sample, unless it has a label of its own.
            belongs = key in self.samples and name.rpartition(".")[0] not in self._dotted_labels
            self.leave_out(SECOND if belongs else DOTTED, name)
        for key, name in self._others.items():
            if key not in self.samples:
                self.leave_out(ORPHAN, name)
        return sorted(rows)


def scan_shard(path: Path, checksums: bool) -> tuple[os.stat_result, list[tuple[int, int, int, int]], LeftOut]:
    """(its size and times, (offset, size, label, crc32) of each sample, what was left out).

    Keys end at the first dot, as in webdataset. Of two formats the first of IMAGE_SUFFIXES is read; a suffix that comes
    again starts another sample of that key. Raises ValueError that names the shard where it is damaged, or a sample
    lacks its image or its label.
    """
    shard = _Shard(path)
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        for member in tar_members(path, shard.left_out):
            shard.add(file, member)
        rows = [
            (offset, size, label, zlib.crc32(os.pread(file.fileno(), size, offset)) if checksums else 0)
            for offset, size, label in shard.finish()
        ]
    return stat, rows, shard.left_out


def _label(file: BinaryIO, member: Member, path: Path) -> int:
    size = min(member.size, _LABEL_BYTES + 1)
    text = os.pread(file.fileno(), size, member.offset)
    label = int(text) if size <= _LABEL_BYTES and _NUMBER.fullmatch(text) else -1
    if not 0 <= label <= MAX_LABEL:
        raise ValueError(
            f"shard {path}: {member.name!r} holds {text!r}, not a class number from 0 to {MAX_LABEL}; build it again"
        )
    return label
