"""`python -m shards.image_folder --source DIR --out DIR`: any folders of pictures as shuffled WebDataset shards.

--source has `train/<class>/` and `val/<class>/` (or `validation/`; `test/` where neither is there), or class folders
alone: then --val-share of each class validates. Folders' names are the classes. --tuning holds out training images to
choose settings on, --train-images keeps a part of the rest; both alike of each class, by the seed. A build that was
stopped goes on where it was with the same command.
"""

import argparse
import dataclasses
import os
import re
from pathlib import Path

from shards import sources, splits
from shards.sources import SourceImage
from toolkit.command import one_line_errors
from toolkit.errors import blaming

_SHARD_BYTES, _SHARD_IMAGES = 16 * 2**20, 500  # a shard has as much, or as many, where the data set has
_MAX_SHARDS = 1024


def catalogue_of(source: Path, val_share: float) -> sources.Catalogue:
    """List all images of the training and validation folders. Raises ValueError for a layout it cannot be."""
    if not source.is_dir():
        raise ValueError(f"--source {source} is not a folder")
    if (source / "train").is_dir():
        if val_share:
            raise ValueError(
                f"--val-share {val_share:g} is for class folders alone, and --source {source} has train/; leave it out"
            )
        return sources.from_image_folder(source)
    if not 0.0 < val_share < 1.0:
        raise ValueError(
            f"--source {source} has no train/, so its folders are the classes; say which part of each is to "
            f"validate, --val-share 0.1 for a tenth (between 0 and 1, given {val_share:g})"
        )
    return sources.from_class_folders({"train": source})


def divide(catalogue: sources.Catalogue, val_share: float, tuning: int, train: int, seed: int) -> sources.Catalogue:
    """Take the validation images where there are none, then those to tune on, then the training images to keep."""
    found = dict(catalogue.splits)
    if "validation" not in found:
        count = round(len(found["train"]) * val_share)
        with blaming(f"--val-share {val_share:g}"):
            found["train"], found["validation"] = splits.hold_out(found["train"], count, seed)
    return dataclasses.replace(catalogue, splits=splits.divide(found, tuning, train, seed))


def facts_of(catalogue: sources.Catalogue, note: str) -> dict[str, str]:
    """What reports say of the data set: the user's note, and how many images each split has."""
    return {"note": "; ".join(filter(None, [note, catalogue.facts.get("note"), splits.counts(catalogue.splits)]))}


def number_of_shards(images: list[SourceImage]) -> int:
    """So many that each has 16 MiB or 500 images, but at most 1,024."""
    size = sum(image.size for image in images)
    return min(max(size // _SHARD_BYTES, len(images) // _SHARD_IMAGES, 1), _MAX_SHARDS)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and build."""
    parser = argparse.ArgumentParser(prog="python -m shards.image_folder", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="folder with train/ and val/, or with the classes")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--name", help="of the data set, and first part of the shards' names (default: --source's)")
    parser.add_argument("--val-share", type=float, default=0.0, help="share of each class that validates")
    splits.add_flags(parser)
    parser.add_argument("--note", default="", help="what reports are to say of these pictures, as where they are from")
    parser.add_argument("--seed", type=int, default=0, help="of the splits and the shuffle (default %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--max-short", type=int, default=0, metavar="PX", help="shrink to this short side (0: never)")
    parser.add_argument("--max-long", type=int, default=0, metavar="PX", help="shrink to this long side (0: never)")
    parser.add_argument("--quality", type=int, default=95, help="of what is encoded anew (default %(default)s)")
    parser.add_argument("--partial", action="store_true", help="leave out what cannot be decoded")
    options = parser.parse_args(argv)
    from shards.dataset import BuildSettings, Cleaning, build

    with one_line_errors(parser, "the same command goes on where it was"):
        catalogue = catalogue_of(options.source, options.val_share)
        catalogue = divide(catalogue, options.val_share, options.tuning, options.train_images, options.seed)
        catalogue = dataclasses.replace(catalogue, facts=facts_of(catalogue, options.note))
        settings = BuildSettings(
            options.name or re.sub(r"[^\w.-]", "-", options.source.resolve().name),
            number_of_shards(catalogue.splits["train"]),
            min(number_of_shards(images) for split, images in catalogue.splits.items() if split != "train"),
            options.seed,
            Cleaning(options.max_long, options.max_short, options.quality),
            options.partial,
        )
        info = build(options.out, catalogue, settings, max(1, options.workers))
    counts = ", ".join(f"{split['num_samples']:,} {name}" for name, split in info["splits"].items())
    print(f"{options.out}: {counts} images of {info['num_classes']:,} classes")  # noqa: T201


if __name__ == "__main__":
    main()
