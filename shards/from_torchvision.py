"""`python -m shards.from_torchvision --name CIFAR100 --root DIR`: one of torchvision's image sets as WebDataset shards.

The archive is read as torchvision wants it in DIR (--download fetches it); images are stored as PNG, without loss, in
the order of a seeded shuffle. --tuning holds out training images to choose settings on, --train-images keeps a part of
the rest; both alike of each class, by the seed.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shards import splits
from shards.writer import Sample, encoded, write_data_set
from toolkit.command import one_line_errors

NAMES = ("CIFAR10", "CIFAR100")  # sets of torchvision that come with train=True and train=False
_ORDERS = {"validation": 0, "train": 1, "tuning": 2}  # with the seed, of a split's shuffle


def _png(data: Any, position: int) -> bytes:
    return encoded(data[position][0], "PNG")


def build(
    name: str,
    root: Path,
    out: Path,
    seed: int,
    shards: int,
    *,
    download: bool = False,
    tuning: int = 0,
    train_images: int = 0,
) -> None:
    """Write the set to `out`; `tuning` and `train_images` as in `splits.divide`.

    Raises ValueError where `root` does not hold it whole, or has too few training images.
    """
    import torchvision.datasets

    try:
        parts = {
            split: getattr(torchvision.datasets, name)(str(root), train=split == "train", download=download)
            for split in ("train", "validation")
        }
    except RuntimeError as error:  # torchvision's word for missing or damaged files
        raise ValueError(f"{root} does not hold {name} whole ({error}); add --download, or check --root") from None
    samples = {
        split: [
            Sample(f"{split}{position:06d}", int(label), partial(_png, data, position), extension="png")
            for position, label in enumerate(data.targets)
        ]
        for split, data in parts.items()
    }
    samples = splits.divide(samples, tuning, train_images, seed)
    written = {}
    for split, rows in samples.items():
        order = np.random.default_rng((seed, _ORDERS[split])).permutation(len(rows)).tolist()
        number = min(shards if split == "train" else max(1, shards // 8), len(rows))
        written[split] = [rows[position] for position in order], number
    note = f"{name} by torchvision as PNG, its test images validate; {splits.counts(samples)}"
    classes = list(parts["train"].classes)
    write_data_set(out, name.lower(), len(classes), written, synthetic=False, seed=seed, class_names=classes, note=note)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and build."""
    parser = argparse.ArgumentParser(prog="python -m shards.from_torchvision", description=__doc__)
    parser.add_argument("--name", choices=NAMES, required=True)
    parser.add_argument("--root", type=Path, required=True, help="where the archive is, as torchvision wants it")
    parser.add_argument("--download", action="store_true", help="fetch the archive into --root first")
    parser.add_argument("--out", type=Path, help="folder to write (default shards/data/<name>)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default %(default)s)")
    parser.add_argument("--shards", type=int, default=32, help="of the training split (default %(default)s)")
    splits.add_flags(parser)
    options = parser.parse_args(argv)
    out = options.out or Path("shards/data") / options.name.lower()
    with one_line_errors(parser, f"what is in {out} is unfinished; the same command makes it anew"):
        build(
            options.name,
            options.root,
            out,
            options.seed,
            options.shards,
            download=options.download,
            tuning=options.tuning,
            train_images=options.train_images,
        )


if __name__ == "__main__":
    main()
