"""What may be changed in an image on its way into a shard: nothing, but for PNG, CMYK and a size asked for."""

import io
from dataclasses import dataclass

from PIL import Image

from shards.writer import encoded
from toolkit.data.decode import decode_rgb


@dataclass(frozen=True)
class Cleaning:
    """Longest and shortest side in pixels that an image may have (0: any), and the quality of what is encoded anew."""

    max_long: int = 0
    max_short: int = 0
    quality: int = 95


def clean_jpeg(data: bytes, cleaning: Cleaning) -> tuple[bytes, int, int]:
    """(JPEG bytes, width, height): those given if they are a JPEG in grey or RGB of an allowed size, else encoded anew.

    Every image is decoded. Raises BadImageError for one that is not whole.
    """
    pixels = decode_rgb(data)  # refuses what the training run would refuse
    with Image.open(io.BytesIO(data)) as image:
        mode, kind = image.mode, image.format
    height, width = pixels.shape[:2]
    factor = min(
        1.0,
        cleaning.max_long / max(height, width) if cleaning.max_long else 1.0,
        cleaning.max_short / min(height, width) if cleaning.max_short else 1.0,
    )
    if kind in ("JPEG", "MPO") and mode in ("L", "RGB") and factor == 1.0:
        return data, width, height
    picture = Image.fromarray(pixels)
    if factor < 1.0:
        width, height = max(1, round(width * factor)), max(1, round(height * factor))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return encoded(picture, "JPEG", quality=cleaning.quality), width, height
