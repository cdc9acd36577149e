"""`python -m shards.imagenet`: ImageNet as shuffled WebDataset shards, from whatever form of it is at hand.

--source names a folder with the ILSVRC2012 archives (nothing is unpacked), an ImageFolder tree (train/<wnid>/,
val/<wnid>/), or existing shards; which of the three is seen from what lies there. Every image is decoded once; PNG and
CMYK images become RGB JPEGs, nothing else is touched unless --max-short or --max-long ask for smaller ones. A build
that was stopped goes on where it was with the same command. An incomplete source needs --partial.
"""

from pathlib import Path

from shards import sources
from shards.pictures import build_from, picture_parser
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
    found = {split: len(catalogue.splits[split]) for split in EXPECTED}
    if found != EXPECTED or len(catalogue.classes) != EXPECTED_CLASSES:
        raise ValueError(
            f"found {found['train']:,} training and {found['validation']:,} validation images of "
            f"{len(catalogue.classes):,} classes, ImageNet-1k has {EXPECTED['train']:,}, {EXPECTED['validation']:,} "
            f"and {EXPECTED_CLASSES:,}; complete the source, or build what is there with --partial"
        )


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and build."""
    parser = picture_parser("shards.imagenet", __doc__, Path("shards/data/imagenet"), "imagenet1k")
    options = parser.parse_args(argv)
    with one_line_errors(parser, "the same command goes on where it was"):
        catalogue = catalogue_of(options.source)
        if not options.partial:
            check_complete(catalogue)
        build_from(options, catalogue)


if __name__ == "__main__":
    main()
