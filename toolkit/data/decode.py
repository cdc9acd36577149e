"""From bytes to uint8 pixels: strict decoding, then resize, crop and flip by the fast path or timm's transforms.

The fast path crops the decoded array and resizes with torch's antialiased uint8 kernel. Whatever needs more (colour
jitter, AutoAugment, unusual crops) goes through timm's own transforms, with Python's, NumPy's and torch's generators
seeded from (seed, epoch, sample), so both paths depend on the sample alone.
"""

import io
import logging
import math
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
    logging.getLogger("toolkit").warning(
        "simplejpeg is not installed: PIL decodes, same pixels, about 0.5 ms an image more"
    )

# PIL's own warning limit; 266 MB once decoded.
MAX_PIXELS = 89_478_485
# PIL has readers for forty more formats, one of which starts Ghostscript on what it is given.
_READERS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    WebPImagePlugin.WebPImageFile,
    BmpImagePlugin.BmpImageFile,
    GifImagePlugin.GifImageFile,
    TiffImagePlugin.TiffImageFile,
    PpmImagePlugin.PpmImageFile,
)

Transform = Callable[[np.ndarray, np.random.Generator], Tensor]


class BadImageError(Exception):
    """The bytes are not an image that can be trusted."""


def decode_rgb(data: bytes) -> np.ndarray:
    """Image bytes -> uint8 [height, width, 3]. Raises BadImageError.

    simplejpeg is strict: it refuses truncated JPEGs. What it refuses PIL may still take (PNG, CMYK, extra bytes).
    Images of more than MAX_PIXELS are refused before they are decoded. 16-bit pixels keep their upper byte.
    """
    if simplejpeg is not None:
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            _check_pixels(width, height)
            return simplejpeg.decode_jpeg(data, colorspace="RGB")
        except (ValueError, KeyError):  # KeyError: a header with a colour space it has no name for
            pass  # PIL decides
    try:
        with Image.open(io.BytesIO(data), formats=[reader.format for reader in _READERS]) as image:
            _check_pixels(*image.size)
            return _to_rgb(image)
    except _DAMAGE as error:
        raise BadImageError(str(error).partition(" <_io")[0]) from error  # not PIL's address of the bytes


def _to_rgb(image: Image.Image) -> np.ndarray:
    # PIL takes the upper byte of 16-bit colour, but cuts 16-bit grey off at 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        grey = np.asarray(image)  # in the file's byte order, which the shift minds
        return np.repeat((grey >> 8).astype(np.uint8)[..., np.newaxis], 3, axis=2)
    if image.mode in ("I", "F"):
        raise BadImageError(f"pixels of 32 bits (mode {image.mode}) have no known white; save it with 8 or 16")
    return np.array(image.convert("RGB"))  # a copy: torch wants memory it may write to


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width} × {height} pixels are more than {MAX_PIXELS:,}")


# What PIL's readers raise on damaged files.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    KeyError,
    IndexError,
    TypeError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors; the size is refused either way
)


def sample_generator(seed: int, epoch: int, sample: int, copy: int = 0) -> np.random.Generator:
    """Generator of a sample's augmentation: by sample, epoch and copy, not by rank or worker."""
    key = np.array([(seed << 32) + epoch, (copy << 48) + sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def resize(image: np.ndarray, size: tuple[int, int], mode: str) -> Tensor:
    """uint8 [h, w, 3] -> uint8 [3, *size], antialiased."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).unsqueeze(0)
    if tuple(pixels.shape[-2:]) == size:
        return pixels[0]
    return torch.nn.functional.interpolate(pixels, size=size, mode=mode, antialias=True, align_corners=False)[0]


def random_crop_box(
    image: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) by the rule of torchvision's RandomResizedCrop: ten tries, then a central crop."""
    height, width = image.shape[:2]
    area = height * width
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop and flips. `interpolation` is bilinear, bicubic or random (one of the two)."""

    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3.0 / 4.0, 4.0 / 3.0)
    hflip: float = 0.5
    vflip: float = 0.0
    interpolation: str = "random"

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Tensor:
        """uint8 [h, w, 3] -> uint8 [3, *size]."""
        top, left, height, width = random_crop_box(image, self.scale, self.ratio, rng)
        mode = ("bilinear", "bicubic")[int(rng.integers(2))] if self.interpolation == "random" else self.interpolation
        pixels = resize(image[top : top + height, left : left + width], self.size, mode)
        flips = [axis for axis, chance in ((-1, self.hflip), (-2, self.vflip)) if rng.random() < chance]
        return pixels.flip(flips) if flips else pixels


@dataclass(frozen=True)
class EvalTransform:
    """Resize the short side to size / crop_pct, take the centre; timm's evaluation transform in `center` mode."""

    size: tuple[int, int]
    crop_pct: float = 0.875
    interpolation: str = "bilinear"

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Tensor:
        """uint8 [h, w, 3] -> uint8 [3, *size]."""
        height, width = image.shape[:2]
        short = math.floor(min(self.size) / self.crop_pct)
        resized = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
        pixels = resize(image, resized, self.interpolation)
        top, left = (round((have - want) / 2.0) for have, want in zip(pixels.shape[-2:], self.size, strict=True))
        return pixels[:, top : top + self.size[0], left : left + self.size[1]]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators set to `seed`, and put back afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  timm's transforms use it
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def timm_transform(
    transform: Callable[[Image.Image], Tensor | np.ndarray], image: np.ndarray, rng: np.random.Generator
) -> Tensor:
    """uint8 [h, w, 3] -> uint8 [3, *size] by one of timm's (PIL image -> uint8 array or tensor [3, h, w])."""
    with _seeded(int(rng.integers(2**62))):
        return torch.as_tensor(np.asarray(transform(Image.fromarray(image))))
