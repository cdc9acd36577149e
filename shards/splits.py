"""Splits that a source does not have: images held out to validate or to choose settings on, and a part kept to train.

All alike of each class and by a seed: the same rows give the same splits, whoever reads them.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from toolkit.errors import blaming


class Labelled(Protocol):
    """An image of which the class number is known."""

    @property
    def label(self) -> int:
        """The class number."""


Image = TypeVar("Image", bound=Labelled)


def hold_out(images: Sequence[Image], count: int, seed: int) -> tuple[list[Image], list[Image]]:
    """(the rest, `count` images), alike of each class and by the seed, both in the order given.

    A class gives its share of the count, rounded by largest remainder. Raises ValueError where nothing would be left.
    """
    labels = np.array([image.label for image in images])
    classes, sizes = np.unique(labels, return_counts=True)
    if not 0 < count < len(images):
        raise ValueError(
            f"{count:,} of {len(images):,} images cannot be held out; give 1 to {len(images) - 1:,} images"
        )
    ideal = sizes * (count / len(images))
    taken = ideal.astype(int)
    taken[np.argsort(taken - ideal, kind="stable")[: count - taken.sum()]] += 1
    rng = np.random.default_rng((seed, count))
    chosen = np.zeros(len(images), bool)
    for label, number in zip(classes, taken, strict=True):
        chosen[rng.permutation(np.flatnonzero(labels == label))[:number]] = True
    return (
        [image for image, out in zip(images, chosen, strict=True) if not out],
        [image for image, out in zip(images, chosen, strict=True) if out],
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--tuning and --train-images, as `divide` takes them."""
    parser.add_argument("--tuning", type=int, default=0, metavar="N", help="training images held out as split tuning")
    parser.add_argument("--train-images", type=int, default=0, metavar="N", help="training images to keep (0: all)")


def divide(splits: Mapping[str, list[Image]], tuning: int, train: int, seed: int) -> dict[str, list[Image]]:
    """The splits with `tuning` training images as a split of their own, and `train` of the rest (0: all) to train on.

    Raises ValueError as `hold_out` does, with the flag.
    """
    splits = dict(splits)
    if tuning:
        with blaming(f"--tuning {tuning}"):
            splits["train"], splits["tuning"] = hold_out(splits["train"], tuning, seed)
    if train and train < len(splits["train"]):
        with blaming(f"--train-images {train}"):
            splits["train"] = hold_out(splits["train"], train, seed)[1]
    return splits


def counts(splits: Mapping[str, Sequence[Image]]) -> str:
    """How many images each split has, as reports say it."""
    return ", ".join(f"{len(images):,} {split}" for split, images in splits.items()) + " images"
