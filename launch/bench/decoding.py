"""From an image's bytes to its pixels: our transform beside timm's and beside the bare calls it is made of."""

import io
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform

from launch.bench.timing import in_turn, median_ratio
from toolkit.data import decode

_PIECE = 20  # images of one turn


def measure_decoding(images: Sequence[bytes], size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The transform against timm's own on uint8, and against the decoder's and the resize's bare calls."""
    ours = decode.TrainTransform(size, interpolation="bilinear")
    theirs = create_transform(size, is_training=True, use_prefetcher=True, interpolation="bilinear", color_jitter=0.0)
    rng = decode.sample_generator(0, 0, 0)
    crops = []
    for data in images:
        pixels = decode.decode_rgb(data)
        top, left, height, width = decode.random_crop_box(pixels, ours.scale, ours.ratio, rng)
        part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        crops.append(torch.from_numpy(part).permute(2, 0, 1).unsqueeze(0))
    turn = iter(range(10**9))

    def bare_decode(data: bytes) -> None:
        if decode.simplejpeg is None:
            np.array(Image.open(io.BytesIO(data)))
        else:
            decode.simplejpeg.decode_jpeg(data, colorspace="RGB")

    def bare_resize(data: bytes) -> None:
        torch.nn.functional.interpolate(crops[next(turn) % len(crops)], size, mode="bilinear", antialias=True)

    ways: dict[str, Callable[[bytes], Any]] = {
        "ours": lambda data: ours(decode.decode_rgb(data), rng),
        "timm": lambda data: theirs(Image.open(io.BytesIO(data)).convert("RGB")),
        "bare decode": bare_decode,
        "bare resize": bare_resize,
    }
    times = in_turn({name: partial(_cpu_ms, way, images) for name, way in ways.items()}, rounds, "transforms")
    return {
        "transform_ms": {name: statistics.median(values) for name, values in times.items()},
        "transform_ratio_to_timm": median_ratio(times, "ours", "timm"),
        "transform_ratio_to_limit": median_ratio(times, "ours", "bare decode", "bare resize"),
        "psnr_db": _psnr(images[:60], size),
    }


def _cpu_ms(function: Callable[[bytes], Any], images: Sequence[bytes], turn: int) -> float:
    """CPU ms an image over the turn's piece of the images."""
    part = [images[(turn * _PIECE + number) % len(images)] for number in range(_PIECE)]
    begin = time.process_time()
    for data in part:
        function(data)
    return 1e3 * (time.process_time() - begin) / _PIECE


def _psnr(images: Sequence[bytes], size: tuple[int, int]) -> float:
    """Peak signal-to-noise ratio in dB against PIL's decoder and its bilinear resize of the same crop."""
    rng, errors = decode.sample_generator(0, 0, 1), []
    for data in images:
        pixels = decode.decode_rgb(data)
        top, left, height, width = decode.random_crop_box(pixels, (0.08, 1.0), (0.75, 4 / 3), rng)
        mine = decode.resize(pixels[top : top + height, left : left + width], size, "bilinear")
        box = (left, top, left + width, top + height)
        theirs = Image.open(io.BytesIO(data)).convert("RGB").resize(size, Image.Resampling.BILINEAR, box=box)
        difference = mine.permute(1, 2, 0).numpy().astype(float) - np.asarray(theirs, dtype=float)
        errors.append(float((difference**2).mean()))
    return 10 * float(np.log10(255**2 / statistics.mean(errors)))
