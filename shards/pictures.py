"""What `shards.image_folder` and `shards.imagenet` do alike: flags, the splits asked for, shards of a good size."""

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from shards import splits
from shards.sources import Catalogue, SourceImage

_SHARD_BYTES, _SHARD_IMAGES = 16 * 2**20, 500  # a shard has as much, or as many, where the data set has
_MAX_SHARDS, _MAX_TRAIN_SHARDS = 64, 1024
_ENCODED_ANEW = {"png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"}  # whose bytes say little


def picture_parser(
    module: str, about: str | None, out: Path | None = None, name: str | None = None
) -> argparse.ArgumentParser:
    """The flags of a command that makes shards of pictures; without `out` the user has to say where they go."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    parser.add_argument("--source", type=Path, required=True, help="folder with the pictures, as said above")
    where = "folder to write" + ("" if out is None else " (default %(default)s)")
    parser.add_argument("--out", type=Path, default=out, required=out is None, help=where)
    first = "of the data set, and first part of the shards' names (default: --source's)"
    parser.add_argument("--name", default=name, help=first if name is None else first.replace("--source's", name))
    splits.add_flags(parser)
    for split in ("train", "validation"):
        parser.add_argument(f"--{split}-shards", type=int, default=0, help="default: each has 16 MiB or 500 images")
    parser.add_argument("--note", default="", help="what reports are to say of these pictures, as where they are from")
    parser.add_argument("--seed", type=int, default=0, help="of the splits and the shuffle (default %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--max-short", type=int, default=0, metavar="PX", help="shrink to this short side (0: never)")
    parser.add_argument("--max-long", type=int, default=0, metavar="PX", help="shrink to this long side (0: never)")
    parser.add_argument("--quality", type=int, default=95, help="of what is encoded anew (default %(default)s)")
    parser.add_argument("--partial", action="store_true", help="take what is there: leave out what cannot be decoded")
    return parser


def number_of_shards(images: Sequence[SourceImage], most: int = _MAX_TRAIN_SHARDS, *, resized: bool = False) -> int:
    """So many, at most `most`, that each has 16 MiB or 500 images; only bytes that stay as they are count as such."""
    kept = (image.size for image in images if Path(image.name).suffix[1:].lower() not in _ENCODED_ANEW)
    size = 0 if resized else sum(kept)
    return min(max(size // _SHARD_BYTES, len(images) // _SHARD_IMAGES, 1), most)


def build_from(options: argparse.Namespace, catalogue: Catalogue) -> None:
    """Divide a catalogue and write it as `picture_parser`'s flags say. Raises ValueError as `shards.dataset.build`."""
    from shards.dataset import BuildSettings, Cleaning, build

    parts = splits.divide(catalogue.splits, options.tuning, options.train_images, options.seed)
    note = "; ".join(filter(None, [options.note, catalogue.facts.get("note"), splits.counts(parts)]))
    catalogue = dataclasses.replace(catalogue, splits=parts, facts=catalogue.facts | {"note": note})
    resized = bool(options.max_short or options.max_long)
    others = (images for split, images in parts.items() if split != "train")
    settings = BuildSettings(
        options.name or re.sub(r"[^\w.-]", "-", options.source.resolve().name).lstrip(".-") or "pictures",
        options.train_shards or number_of_shards(parts["train"], resized=resized),
        options.validation_shards or min(number_of_shards(images, _MAX_SHARDS, resized=resized) for images in others),
        options.seed,
        Cleaning(options.max_long, options.max_short, options.quality),
        options.partial,
    )
    info = build(options.out, catalogue, settings, max(1, options.workers))
    counts = ", ".join(f"{split['num_samples']:,} {name}" for name, split in info["splits"].items())
    print(f"{options.out}: {counts} images of {info['num_classes']:,} classes")  # noqa: T201
