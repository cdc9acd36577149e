"""`python -m shards.digits`: the 1,797 handwritten digit scans that come inside scikit-learn, as WebDataset shards.

Real images that need no download. The 8×8 scans are enlarged to 32×32 (Pillow, bicubic) and stored as JPEG of quality
95; 80 % of each class train, 20 % validate, by a seeded shuffle. The same Pillow gives the same bytes.

`--hard` makes a task that tells methods apart: 30 images of each class train, 50 are a split `tuning` on which settings
are chosen, and all others validate; every image of all three is shifted by up to 3 pixels and gets Gaussian noise.
Those of them that validate without `--hard` too are also a split `unseen`, for models first trained on the clean scans.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.command import one_line_errors

if TYPE_CHECKING:
    import numpy as np

SIZE = 32
QUALITY = 95
VALIDATION_SHARE = 0.2
TRAIN_PER_CLASS, TUNING_PER_CLASS, SHIFT, NOISE = 30, 50, 3, 96.0  # of --hard; the noise in grey levels of 255


def digit_jpeg(scan: "np.ndarray", disturb: Sequence[int] | None = None) -> bytes:
    """8×8 scan with values 0..16 -> JPEG bytes; `disturb` seeds a shift and noise."""
    import numpy as np
    from PIL import Image

    from shards.writer import encoded

    grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    large = grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    if disturb is not None:
        rng = np.random.default_rng(disturb)
        pixels = np.roll(np.asarray(large, np.float64), rng.integers(-SHIFT, SHIFT + 1, 2), (0, 1))
        pixels += rng.normal(0.0, NOISE, pixels.shape)
        large = Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))
    return encoded(large.convert("RGB"), "JPEG", quality=QUALITY)


def stratified_split(labels: "np.ndarray", seed: int) -> "tuple[np.ndarray, np.ndarray]":
    """(train, validation) positions, VALIDATION_SHARE of each class in the latter, both shuffled by `seed`."""
    import numpy as np

    rng = np.random.default_rng(seed)
    train, validation = [], []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut = round(len(members) * VALIDATION_SHARE)
        validation.append(members[:cut])
        train.append(members[cut:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(validation))


def hard_splits(labels: "np.ndarray", train: "np.ndarray", validation: "np.ndarray") -> "dict[str, np.ndarray]":
    """Few of the training positions train, some tune; the others join the validation positions, the unseen ones."""
    import numpy as np

    parts: dict[str, list[np.ndarray]] = {"train": [], "tuning": [], "validation": [validation]}
    for label in np.unique(labels):
        members = train[labels[train] == label]
        cuts = np.split(members, [TRAIN_PER_CLASS, TRAIN_PER_CLASS + TUNING_PER_CLASS])
        for split, positions in zip(parts, cuts, strict=True):
            parts[split].append(positions)
    # By position and not by class, so that shards are alike; the train order is shuffled anyway.
    return {split: np.sort(np.concatenate(p)) for split, p in (*parts.items(), ("unseen", [validation]))}


def build(out: Path, seed: int, train_shards: int, validation_shards: int, *, hard: bool = False) -> None:
    """Write the data set to `out`."""
    from sklearn.datasets import load_digits

    from shards.writer import Sample, write_data_set

    digits = load_digits()
    train, validation = stratified_split(digits.target, seed)
    parts = hard_splits(digits.target, train, validation) if hard else {"train": train, "validation": validation}

    def sample(position: int) -> Sample:
        content = partial(digit_jpeg, digits.images[position], (seed, position) if hard else None)
        return Sample(f"digit{position:04d}", int(digits.target[position]), content)

    splits = {
        split: (
            [sample(position) for position in positions.tolist()],
            train_shards if split == "train" else validation_shards,
        )
        for split, positions in parts.items()
    }
    note = (
        "1,797 handwritten digit scans (scikit-learn, UCI Optical Recognition of Handwritten Digits), 8×8 pixels "
        f"enlarged to 32×32, JPEG quality 95, {'disturbed' if hard else 'stratified 80/20'}"
    )
    if hard:
        sizes = ", ".join(f"{len(parts[split])} {split}" for split in ("train", "tuning", "validation"))
        note += f": shifted by up to {SHIFT} pixels, Gaussian noise of {NOISE:g} grey levels; {sizes} images"
    write_data_set(out, "digits-hard" if hard else "digits", 10, splits, synthetic=False, seed=seed, note=note)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and build."""
    parser = argparse.ArgumentParser(prog="python -m shards.digits", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to write (default shards/data/digits, or digits-hard)")
    parser.add_argument("--hard", action="store_true", help="few, shifted and noisy images, and a tuning split")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order (default %(default)s)")
    parser.add_argument("--train-shards", type=int, default=8, help="default %(default)s")
    parser.add_argument("--validation-shards", type=int, default=2, help="default %(default)s")
    options = parser.parse_args(argv)
    out = options.out or Path("shards/data") / ("digits-hard" if options.hard else "digits")
    with one_line_errors(parser, f"what is in {out} is unfinished; the same command makes it anew"):
        build(out, options.seed, options.train_shards, options.validation_shards, hard=options.hard)


if __name__ == "__main__":
    main()
