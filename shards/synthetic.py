"""`python -m shards.synthetic`: drawn, learnable, ImageNet-like JPEGs for load, scale and memory work.

Each class is a colour pair, a texture direction and scale, and a shape; each image varies place, size, contrast and
noise, with a 1/f texture behind, so that files have the entropy of photographs. Labelled synthetic in `_info.json`
and so in every report made from them: accuracy on them says nothing about photographs.
"""

import argparse
import io
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_TRAIN, _VALIDATION = 0, 1


def _background(height: int, width: int, rng: "np.random.Generator") -> "np.ndarray":
    """float32 [h, w, 3] of 1/f noise with unit spread."""
    import numpy as np

    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((3, height, width)), axes=(1, 2)) / frequency
    field = np.fft.irfft2(spectrum, s=(height, width), axes=(1, 2)).transpose(1, 2, 0)
    return ((field - field.mean()) / (field.std() + 1e-9)).astype(np.float32)


def draw(label: int, height: int, width: int, rng: "np.random.Generator") -> "np.ndarray":
    """uint8 [h, w, 3]: one image of class `label`. The class fixes the motif, `rng` everything else."""
    import numpy as np

    motif = np.random.default_rng(label)
    front, back = motif.uniform(0, 1, 3), motif.uniform(0, 1, 3)
    angle, waves, corners = motif.uniform(0, np.pi), motif.uniform(3, 14), int(motif.integers(3, 8))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    centre_y, centre_x = rng.uniform(0.35, 0.65) * height, rng.uniform(0.35, 0.65) * width
    radius = rng.uniform(0.25, 0.42) * min(height, width)
    dy, dx = (y - centre_y) / radius, (x - centre_x) / radius
    turn = rng.uniform(-0.2, 0.2)
    outline = 0.75 + 0.25 * np.cos(corners * (np.arctan2(dy, dx) + turn))
    inside = (np.hypot(dy, dx) < outline)[..., None]
    stripes = np.sin(waves * (dx * np.cos(angle + turn) + dy * np.sin(angle + turn)) + rng.uniform(0, 6.3))[..., None]
    shape = np.where(stripes > 0, front, back)
    scene = 0.5 + 0.18 * _background(height, width, rng)
    image = np.where(inside, rng.uniform(0.7, 1.0) * shape, scene) + 0.03 * rng.standard_normal((height, width, 1))
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def _jpeg(split: int, number: int, label: int, size: int, seed: int, quality: int) -> bytes:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng((seed, split, number))
    height, width = (round(size * rng.uniform(1.0, 1.35)) for _ in range(2))
    buffer = io.BytesIO()
    Image.fromarray(draw(label, height, width, rng)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def build(
    out: Path, classes: int, images: int, validation: int, size: int, seed: int, quality: int, shards: int
) -> None:
    """Write the data set to `out`."""
    import numpy as np

    from shards.writer import Sample, write_info, write_split
    from toolkit.progress import Progress

    progress = Progress(images + validation, "images", "synthetic")
    splits = {}
    parts = ((_TRAIN, "train", images, shards), (_VALIDATION, "validation", validation, max(1, shards // 8)))
    for split_number, split, count, num_shards in parts:
        order = np.random.default_rng((seed, split_number)).permutation(count).tolist()
        samples = [
            Sample(f"{split}{n:07d}", n % classes, partial(_jpeg, split_number, n, n % classes, size, seed, quality))
            for n in order
        ]
        splits[split] = write_split(out, split, "synthetic", samples, num_shards, progress.advance)
    progress.close()
    write_info(
        out,
        f"synthetic-{classes}",
        classes,
        splits,
        synthetic=True,
        seed=seed,
        note=f"SYNTHETIC: {classes} classes of drawn shapes, {size} to {round(size * 1.35)} px, JPEG quality {quality}",
    )


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
    try:
        if min(options.classes, options.images, validation, options.size) < 1:
            raise ValueError("--classes, --images, --validation and --size must be at least 1")
        build(
            out,
            options.classes,
            options.images,
            validation,
            options.size,
            options.seed,
            options.quality,
            options.shards,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"shards.synthetic: error: {error}\n")


if __name__ == "__main__":
    main()
