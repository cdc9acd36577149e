"""Reads the headers of tars that may be a stranger's: what they claim is held against the file before it counts."""

import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from toolkit.files import UnsafeNameError, check_name

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 2**28  # read in one piece; the largest photographs have a fifth of it
MAX_LABEL = 2**31 - 1  # labels are kept as int32
_LABEL_BYTES = 64  # a number and white space
_HEADER_BYTES = 2**16  # of a long name or extended attributes, which tarfile reads in one piece


class _Headers:
    """A file as tarfile sees it: it reads small pieces forwards, whatever sizes, negative ones too, a header claims."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self._file = file
        self._end = end

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, place: int) -> int:
        if not self.tell() - 1 <= place <= self._end:  # tarfile looks at the byte before
            raise tarfile.ReadError(f"a header at {self.tell()} says that the next is at {place}")
        return self._file.seek(place)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header at {self.tell()} claims {size} bytes more of header")
        return self._file.read(size)


def tar_members(file: BinaryIO, path: Path, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The files of the tar that is in `file` from `start` to `end` (its last byte); their data lie between these.

    Raises ValueError, naming `path`, for a tar that is damaged, cut short, or claims what it has not.
    """
    end = os.fstat(file.fileno()).st_size if end is None else end
    file.seek(start)
    try:
        tar = tarfile.open(fileobj=_Headers(file, end), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
        while (member := tar.next()) is not None:
            tar.members = []  # else it keeps 1 GB of headers for ImageNet
            if not member.isfile():
                continue
            check_name(member.name, f"{path}: member", dash=True)  # no command sees it
            if member.issparse():
                raise ValueError(f"{member.name!r} is stored with holes")
            if not 0 <= member.size <= end - member.offset_data:
                raise ValueError(f"{member.name!r} claims {member.size} bytes, the file has less: it is cut short")
            yield member
        # tarfile takes a file that ends after a member for a whole tar; a whole one ends with empty blocks.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("it is cut short: the end mark is missing")
    except UnsafeNameError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is no whole tar ({error}); build or copy it again") from None


def scan_shard(path: Path, checksums: bool) -> list[tuple[int, int, int, int]]:
    """(offset, size, label, crc32) of each sample. Keys end at the first dot, as in webdataset.

    Raises ValueError that names the shard where it is damaged, or a sample lacks its image or its label.
    """
    images: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, int] = {}
    with open(path, "rb") as file:
        for member in tar_members(file, path):
            folder, _, base = member.name.rpartition("/")
            key, _, suffix = base.partition(".")
            key = f"{folder}/{key}"
            if suffix.lower() == "cls":
                labels[key] = _label(file, member, path)
            elif suffix.lower() in IMAGE_SUFFIXES:
                if member.size > MAX_IMAGE_BYTES:
                    raise ValueError(
                        f"shard {path}: {member.name!r} has {member.size:,} bytes, more than the {MAX_IMAGE_BYTES:,} "
                        "that an image may have; take it out"
                    )
                crc = zlib.crc32(_content(file, member)) if checksums else 0
                images[key] = (member.offset_data, member.size, crc)
    unpaired = sorted(images.keys() ^ labels.keys())
    if unpaired:
        raise ValueError(f"shard {path}: sample {unpaired[0]!r} lacks its image or its .cls; build it again")
    return [(offset, size, labels[key], crc) for key, (offset, size, crc) in images.items()]


def _label(file: BinaryIO, member: tarfile.TarInfo, path: Path) -> int:
    text = _content(file, member) if member.size <= _LABEL_BYTES else b""
    try:
        label = int(text)
    except ValueError:
        label = -1
    if not 0 <= label <= MAX_LABEL:
        raise ValueError(
            f"shard {path}: {member.name!r} holds {text!r}, not a class number from 0 to {MAX_LABEL}; build it again"
        )
    return label


def _content(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    return os.pread(file.fileno(), member.size, member.offset_data)
