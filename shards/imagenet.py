"""`python -m shards.imagenet`: ImageNet as shuffled WebDataset shards, from whatever form of it is at hand.

--source names a folder with the ILSVRC2012 archives (nothing is unpacked), an ImageFolder tree (train/<wnid>/,
val/<wnid>/), or existing shards; which of the three is seen from what lies there. Every image is decoded once; PNG and
CMYK images become RGB JPEGs, nothing else is touched unless --max-short or --max-long ask for smaller ones. A build
that was stopped goes on where it was with the same command.
"""

import argparse
import os
from pathlib import Path

from shards import sources
from toolkit.command import one_line_errors
from toolkit.progress import Progress

EXPECTED = {"train": 1_281_167, "validation": 50_000}
EXPECTED_CLASSES = 1_000


def catalogue_of(source: Path) -> sources.Catalogue:
    """List all images of a source; see the module's text for the layouts."""
    if not source.is_dir():
        raise ValueError(f"--source {source} is not a folder")
    with Progress(sum(EXPECTED.values()), "images", "listing") as progress:
        if (source / "ILSVRC2012_img_train.tar").exists():
            return sources.from_archives(source, progress.advance)
        if (source / "train").is_dir():
            return sources.from_image_folder(source, progress.advance)
        if any(any(source.glob(pattern)) for pattern in ("*info.json", "*.tar", "*.tar.*", "*.tgz")):
            return sources.from_shards(source, progress.advance)
    raise ValueError(
        f"--source {source} has neither ILSVRC2012_img_train.tar nor train/ nor shards (*.tar); name a folder that has"
    )


def check_complete(catalogue: sources.Catalogue) -> None:
    """Raise ValueError unless it is all of ImageNet-1k."""
    found = {split: len(images) for split, images in catalogue.splits.items()}
    if found != EXPECTED or len(catalogue.classes) != EXPECTED_CLASSES:
        raise ValueError(
            f"found {found['train']:,} training and {found['validation']:,} validation images of "
            f"{len(catalogue.classes):,} classes, ImageNet-1k has {EXPECTED['train']:,}, {EXPECTED['validation']:,} "
            f"and {EXPECTED_CLASSES:,}; complete the source, or build what is there with --partial"
        )


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and build."""
    parser = argparse.ArgumentParser(prog="python -m shards.imagenet", description=__doc__)
    parser.add_argument(
        "--source", type=Path, required=True, help="folder with archives, an ImageFolder tree or shards"
    )
    parser.add_argument("--out", type=Path, default=Path("shards/data/imagenet"), help="default %(default)s")
    parser.add_argument("--name", default="imagenet1k", help="first part of the shards' names (default %(default)s)")
    parser.add_argument("--train-shards", type=int, default=1024, help="default %(default)s")
    parser.add_argument("--validation-shards", type=int, default=64, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the global shuffle (default %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--max-short", type=int, default=0, metavar="PX", help="shrink to this short side (0: never)")
    parser.add_argument("--max-long", type=int, default=0, metavar="PX", help="shrink to this long side (0: never)")
    parser.add_argument("--quality", type=int, default=95, help="of what is encoded anew (default %(default)s)")
    parser.add_argument(
        "--partial", action="store_true", help="take an incomplete source, and leave out what cannot be decoded"
    )
    options = parser.parse_args(argv)
    from shards.dataset import BuildSettings, Cleaning, build

    settings = BuildSettings(
        options.name,
        options.train_shards,
        options.validation_shards,
        options.seed,
        Cleaning(options.max_long, options.max_short, options.quality),
        options.partial,
    )
    with one_line_errors(parser, "the same command goes on where it was"):
        catalogue = catalogue_of(options.source)
        if not options.partial:
            check_complete(catalogue)
        info = build(options.out, catalogue, settings, max(1, options.workers))
    counts = ", ".join(f"{split['num_samples']:,} {name}" for name, split in info["splits"].items())
    print(f"{options.out}: {counts} images of {info['num_classes']:,} classes")  # noqa: T201


if __name__ == "__main__":
    main()
