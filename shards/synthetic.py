"""`python -m shards.synthetic`: drawn, learnable, ImageNet-like JPEGs for load, scale and memory work.

Each class is a colour pair, a texture direction and scale, and a shape; each image varies place, size, contrast and
noise, with a 1/f texture behind, so that files have the entropy of photographs. Labelled synthetic in `_info.json`
and so in every report made from them: accuracy on them says nothing about photographs.
"""

import argparse
from functools import partial
from pathlib import Path

from toolkit.command import one_line_errors


def _jpeg(split: int, number: int, label: int, size: int, seed: int, quality: int) -> bytes:
    import numpy as np
    from PIL import Image

    from shards.drawing import draw
    from shards.writer import encoded

    rng = np.random.default_rng((seed, split, number))
    height, width = (round(size * rng.uniform(1.0, 1.35)) for _ in range(2))
    return encoded(Image.fromarray(draw(label, height, width, rng)), "JPEG", quality=quality)


def build(
    out: Path, classes: int, images: int, validation: int, size: int, seed: int, quality: int, shards: int
) -> None:
    """Write the data set to `out`."""
    import numpy as np

    from shards.writer import Sample, write_data_set

    splits = {}
    parts = {"train": (images, shards), "validation": (validation, max(1, shards // 8))}
    for number, (split, (count, num_shards)) in enumerate(parts.items()):
        order = np.random.default_rng((seed, number)).permutation(count).tolist()
        samples = [
            Sample(f"{split}{n:07d}", n % classes, partial(_jpeg, number, n, n % classes, size, seed, quality))
            for n in order
        ]
        splits[split] = samples, num_shards
    note = f"SYNTHETIC: {classes} classes of drawn shapes, {size} to {round(size * 1.35)} px, JPEG quality {quality}"
    write_data_set(out, f"synthetic-{classes}", classes, splits, synthetic=True, seed=seed, note=note)


def main(argv: list[str] | None = None) -> None:
    """Parse the flags and build."""
    parser = argparse.ArgumentParser(prog="python -m shards.synthetic", description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="folder (default shards/data/synthetic-<classes>)")
    parser.add_argument("--classes", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--images", type=int, default=20_000, help="training images (default %(default)s)")
    parser.add_argument("--validation", type=int, default=None, help="validation images (default images / 10)")
    parser.add_argument("--size", type=int, default=224, help="shortest side in pixels (default %(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality (default %(default)s)")
    parser.add_argument("--shards", type=int, default=16, help="training shards (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    options = parser.parse_args(argv)
    out = options.out or Path(f"shards/data/synthetic-{options.classes}")
    validation = options.validation if options.validation is not None else max(1, options.images // 10)
    with one_line_errors(parser, f"what is in {out} is unfinished; the same command makes it anew"):
        if min(options.classes, options.images, validation, options.size) < 1:
            raise ValueError("--classes, --images, --validation and --size must be at least 1")
        sizes = options.classes, options.images, validation, options.size
        build(out, *sizes, options.seed, options.quality, options.shards)


if __name__ == "__main__":
    main()
