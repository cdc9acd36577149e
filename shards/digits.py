"""`python -m shards.digits`: the 1,797 handwritten digit scans that come inside scikit-learn, as WebDataset shards.

Real images that need no download. The 8×8 scans are enlarged to 32×32 (Pillow, bicubic) and stored as JPEG of quality
95; 80 % of each class train, 20 % validate, by a seeded shuffle. The same Pillow gives the same bytes.
"""

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SIZE = 32
QUALITY = 95
VALIDATION_SHARE = 0.2


def _jpeg(scan: "np.ndarray") -> bytes:
    """8×8 scan with values 0..16 -> JPEG bytes."""
    import numpy as np
    from PIL import Image

    grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    buffer = io.BytesIO()
    grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def stratified_split(labels: "np.ndarray", seed: int) -> tuple["np.ndarray", "np.ndarray"]:
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


def build(out: Path, seed: int, train_shards: int, validation_shards: int) -> None:
    """Write the data set to `out`."""
    from functools import partial

    from sklearn.datasets import load_digits

    from shards.writer import Sample, write_info, write_split
    from toolkit.progress import Progress

    digits = load_digits()
    progress = Progress(len(digits.images), "images", "digits")
    splits = {}
    parts = stratified_split(digits.target, seed)
    for split, positions, shards in zip(("train", "validation"), parts, (train_shards, validation_shards), strict=True):
        samples = [
            Sample(f"digit{position:04d}", int(digits.target[position]), partial(_jpeg, digits.images[position]))
            for position in positions.tolist()
        ]
        splits[split] = write_split(out, split, "digits", samples, shards, progress.advance)
    progress.close()
    write_info(
        out, "digits", 10, splits, synthetic=False, seed=seed,
        note="1,797 handwritten digit scans (scikit-learn, UCI Optical Recognition of Handwritten Digits), 8×8 pixels "
        "enlarged to 32×32, JPEG quality 95, stratified 80/20",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and build."""
    parser = argparse.ArgumentParser(prog="python -m shards.digits", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("shards/data/digits"), help="folder to write (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and the order (default %(default)s)")
    parser.add_argument("--train-shards", type=int, default=8, help="default %(default)s")
    parser.add_argument("--validation-shards", type=int, default=2, help="default %(default)s")
    options = parser.parse_args(argv)
    try:
        build(options.out, options.seed, options.train_shards, options.validation_shards)
    except (ValueError, OSError) as error:
        parser.exit(2, f"shards.digits: error: {error}\n")


if __name__ == "__main__":
    main()
