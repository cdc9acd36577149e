"""Builds a data set of shards from any catalogue: planned as a whole, written by many processes, resumable.

The plan (which image goes where, under which key) is made first from the seed alone, so a shard's bytes depend neither
on the number of processes nor on what was there before: a killed build that is started again ends byte-identical.
Nothing is changed in an image on its way into a shard, but for PNG, CMYK and a size asked for.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.sources import Catalogue, SourceImage
from shards.writer import Sample, encoded, index_split, shard_parts, write_info, write_shard
from toolkit.command import say
from toolkit.data.decode import BadImageError, decode_rgb
from toolkit.data.index import scan_shards
from toolkit.data.info import INFO_NAME
from toolkit.files import check_name, write_json
from toolkit.log import printable
from toolkit.process import in_processes
from toolkit.progress import Progress

_PLAN_NAME = "_build.json"  # there while a build is unfinished: what it was asked for


@dataclass(frozen=True)
class Cleaning:
    """Longest and shortest side in pixels that an image may have (0: any), and the quality of what is encoded anew."""

    max_long: int = 0
    max_short: int = 0
    quality: int = 95


@dataclass(frozen=True)
class BuildSettings:
    """What a build was asked for; recorded in `_info.json`. `partial` leaves out images that cannot be decoded."""

    name: str
    train_shards: int
    validation_shards: int
    seed: int
    cleaning: Cleaning
    partial: bool = False


Rows = Sequence[tuple[str, SourceImage]]
"""(key, image) of each sample of a shard."""


def _key(image: SourceImage, taken: set[str]) -> str:
    """The file's name without suffix and dots, unique in its split."""
    stem = Path(image.name).stem.replace(".", "_")
    key, number = stem, 1
    while key in taken:
        key, number = f"{stem}_{number}", number + 1
    taken.add(key)
    return key


def _plan(catalogue: Catalogue, settings: BuildSettings) -> dict[str, dict[str, Rows]]:
    """Split -> its shards by file name, in the order of a global shuffle by the seed."""
    plan = {}
    for number, (split, images) in enumerate(catalogue.splits.items()):
        count = settings.train_shards if split == "train" else settings.validation_shards
        order = np.random.default_rng((settings.seed, number)).permutation(len(images)).tolist()
        taken: set[str] = set()
        rows = [(_key(images[place], taken), images[place]) for place in order]
        plan[split] = shard_parts(settings.name, split, rows, count)
    return plan


def _fingerprint(catalogue: Catalogue, settings: BuildSettings) -> str:
    """sha256 of what a build reads and how; paths are left out, so a moved source is the same source."""
    digest = hashlib.sha256(json.dumps([asdict(settings), catalogue.classes]).encode())
    for split, images in catalogue.splits.items():
        rows = [(Path(image.path).name, image.offset, image.size, image.name, image.label) for image in images]
        digest.update(json.dumps([split, rows]).encode())
    return digest.hexdigest()


def clean_jpeg(data: bytes, cleaning: Cleaning) -> tuple[bytes, int, int]:
    """(JPEG bytes, width, height): those given if they are a JPEG in grey or RGB of an allowed size, else encoded anew.

    Every image is decoded. Raises BadImageError for one that is not whole.
    """
    pixels = decode_rgb(data)  # refuses what the training run would refuse
    with Image.open(io.BytesIO(data)) as image:
        mode, kind = image.mode, image.format
    height, width = pixels.shape[:2]
    factor = min(
        1.0,
        cleaning.max_long / max(height, width) if cleaning.max_long else 1.0,
        cleaning.max_short / min(height, width) if cleaning.max_short else 1.0,
    )
    if kind in ("JPEG", "MPO") and mode in ("L", "RGB") and factor == 1.0:
        return data, width, height
    picture = Image.fromarray(pixels)
    if factor < 1.0:
        width, height = max(1, round(width * factor)), max(1, round(height * factor))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return encoded(picture, "JPEG", quality=cleaning.quality), width, height


def _write(settings: BuildSettings, shard: tuple[Path, Rows]) -> list[str]:
    """Write one shard; returns the images that were left out, with the reason."""
    path, rows = shard
    bad: list[str] = []

    def samples() -> Iterator[Sample]:
        for key, image in rows:
            try:
                data, width, height = clean_jpeg(image.read(), settings.cleaning)
            except BadImageError as error:
                reason = printable(f"{image.name} in {image.path}: {error}")
                if not settings.partial:
                    raise ValueError(
                        f"{reason}; fetch it again, or leave out what cannot be decoded with --partial"
                    ) from None
                bad.append(reason)
                continue
            meta = {"filename": image.name, "label": image.label, "width": width, "height": height}
            yield Sample(key, image.label, partial(bytes, data), meta)

    write_shard(path, samples())
    return bad


def _write_missing(shards: Mapping[Path, Rows], settings: BuildSettings, workers: int) -> list[str]:
    """Write the shards that are not there yet; returns what was left out."""
    bad: list[str] = []
    missing = {path: rows for path, rows in shards.items() if not path.is_file()}
    with Progress(sum(map(len, shards.values())), "images", settings.name) as progress:
        progress.skip(progress.total - sum(map(len, missing.values())))
        written = in_processes(partial(_write, settings), missing.items(), workers)
        for rows, left_out in zip(missing.values(), written, strict=True):
            bad += left_out
            progress.advance(len(rows))
    return bad


def build(out: Path, catalogue: Catalogue, settings: BuildSettings, workers: int) -> dict[str, Any]:
    """Write the data set, or what is missing of it, and `_info.json` last. Returns the latter's content.

    Raises ValueError where `out` holds a data set made with other settings or from other
    images, and for images that cannot be decoded unless `settings.partial`.
    """
    check_name(settings.name, "--name")
    fingerprint = _fingerprint(catalogue, settings)
    plan = _plan(catalogue, settings)
    for name in (INFO_NAME, _PLAN_NAME):
        if (out / name).is_file():
            there = json.loads((out / name).read_text())
            if there.get("build_fingerprint") != fingerprint:
                raise ValueError(f"{out} holds another data set or build ({name}); use another --out, or delete it")
            if name == INFO_NAME:
                return dict(there)
    write_json(out / _PLAN_NAME, {"build_fingerprint": fingerprint, **asdict(settings)}, indent=1)
    for stray in out.glob("*.tmp"):  # of a build that was killed
        stray.unlink()
    shards = {out / name: rows for parts in plan.values() for name, rows in parts.items()}
    left_out = _write_missing(shards, settings, workers)
    splits = {}
    for split, images in catalogue.splits.items():
        # Read with checksums: the index is of the files, not of the plan.
        index = scan_shards(out, list(plan[split]), checksums=True, run=partial(in_processes, workers=workers))
        splits[split] = index_split(out, split, index)
        counts = {reason: count for reason, (count, _) in catalogue.left_out.get(split, {}).items()}
        bad = len(images) - splits[split]["num_samples"]  # also by a run that was stopped
        splits[split]["left_out"] = bad + sum(counts.values())
        splits[split]["left_out_reasons"] = ({"images that cannot be decoded": bad} if bad else {}) | counts
    write_json(out / "classes.json", catalogue.classes, indent=0)
    write_info(
        out,
        settings.name,
        len(catalogue.classes),
        splits,
        seed=settings.seed,
        build_fingerprint=fingerprint,
        partial=settings.partial,
        **asdict(settings.cleaning),
        **({"synthetic": False} | catalogue.facts),
    )
    (out / _PLAN_NAME).unlink()
    for reason in left_out:
        say(f"left out: {reason}")
    for split, reasons in catalogue.left_out.items():
        for reason, (count, first) in reasons.items():
            say(printable(f"left out of {split}: {count:,} {reason}, first {first}"))
    return dict(json.loads((out / INFO_NAME).read_text()))
