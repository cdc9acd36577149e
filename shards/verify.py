"""`python -m shards.verify DIR`: reads every image of a data set again, checks it against the index and decodes it."""

import argparse
import os
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from toolkit.command import one_line_errors
from toolkit.data.index import ShardIndex, load_split, scan_shards
from toolkit.data.info import read_info
from toolkit.process import in_processes
from toolkit.progress import Progress


def _check_shard(index: ShardIndex, shard: int) -> tuple[int, list[str]]:
    """(images read, what is wrong with them) of one shard."""
    from toolkit.data.decode import BadImageError, decode_rgb

    path = index.folder / index.names[shard]
    rows = np.flatnonzero(index.shard == shard)
    wrong = []
    with open(path, "rb") as file:
        for row in rows.tolist():
            where = f"{path}, image {row} at byte {index.offset[row]}"
            data = os.pread(file.fileno(), int(index.size[row]), int(index.offset[row]))
            try:
                if index.has_checksums and zlib.crc32(data) != int(index.crc32[row]):
                    raise BadImageError("its bytes are not those indexed")
                decode_rgb(data)
            except BadImageError as error:
                wrong.append(f"{where}: {error}")
    return len(rows), wrong


def verify(folder: Path, workers: int) -> list[str]:
    """Everything that is wrong with a data set. Raises ValueError where a shard is missing, cut short or unreadable."""
    wrong: list[str] = []
    for split in read_info(folder)["splits"]:
        index = load_split(folder, split)
        found = scan_shards(folder, index.names)
        for column in ("shard", "offset", "size", "label"):
            if not np.array_equal(getattr(found, column), getattr(index, column)):
                wrong.append(f"{folder}, split {split}: the index has another {column} for some image than the shards")
        with Progress(len(index), "images", f"verify {split}") as progress:
            for count, lines in in_processes(partial(_check_shard, index), range(len(index.names)), workers):
                wrong += lines
                progress.advance(count)
    return wrong


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and verify; the exit code says whether all is well."""
    parser = argparse.ArgumentParser(prog="python -m shards.verify", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with _info.json and shards")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    options = parser.parse_args(argv)
    with one_line_errors(parser):
        wrong = verify(options.folder, max(1, options.workers))
    for line in wrong:
        print(line)  # noqa: T201
    if wrong:
        parser.exit(1, f"shards.verify: {len(wrong)} faults in {options.folder}\n")
    print(f"{options.folder}: every image is as indexed and can be decoded")  # noqa: T201


if __name__ == "__main__":
    main()
