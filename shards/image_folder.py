"""`python -m shards.image_folder --source DIR --out DIR`: any folders of pictures as shuffled WebDataset shards.

--source has `train/<class>/` and `val/<class>/` (or `validation/`, `valid/`; `test/<class>/` validates where none is
there, and is a split of its own where one is), or class folders alone: then --val-share of each class validates.
Folders' names are the classes. --tuning holds out training images to choose settings on, --train-images keeps a part of
the rest; both alike of each class, by the seed. A build that was stopped goes on where it was with the same command.
"""

import dataclasses
from pathlib import Path

from shards import sources, splits
from shards.pictures import build_from, picture_parser
from toolkit.command import one_line_errors
from toolkit.errors import blaming, refuse


def catalogue_of(source: Path, val_share: float, seed: int = 0) -> sources.Catalogue:
    """List all images, those that validate taken from each class where they have no folder of their own.

    Raises ValueError for a layout it cannot be, and for a share that leaves nothing.
    """
    if not source.is_dir():
        raise ValueError(f"--source {source} is not a folder")
    train = sources.training_folder(source)
    if train is not None and sources.validation_folder(source) is not None:
        refuse(
            {
                f"--val-share {val_share:g} is for class folders alone, and --source {source} has train/ and a folder "
                "to validate; leave it out": val_share
            }
        )
        return sources.from_image_folder(source)
    if not 0.0 < val_share < 1.0:
        lack = "train/, so its folders are the classes" if train is None else "val/ beside train/"
        raise ValueError(
            f"--source {source} has no {lack}; say which part of each class is to validate, --val-share 0.1 for a "
            f"tenth (between 0 and 1, given {val_share:g})"
        )
    if train is None:
        catalogue = sources.from_class_folders({"train": source})
    else:
        catalogue = sources.from_split_folders(source, {"train": train})
    images = catalogue.splits["train"]
    with blaming(f"--val-share {val_share:g}"):
        rest, held_out = splits.hold_out(images, round(len(images) * val_share), seed)
    return dataclasses.replace(catalogue, splits={"train": rest, "validation": held_out})


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and build."""
    parser = picture_parser("shards.image_folder", __doc__)
    parser.add_argument("--val-share", type=float, default=0.0, help="share of each class that validates")
    options = parser.parse_args(argv)
    with one_line_errors(parser, "the same command goes on where it was"):
        build_from(options, catalogue_of(options.source, options.val_share, options.seed))


if __name__ == "__main__":
    main()
