"""`python -m launch.bench data`: what an image costs from the shard to the batch, beside timm's own way.

Images are 500 × 375 JPEGs of about 107 KB (drawn; ImageNet's mean is 110 KB), random resized crop to 224 and flip.
All methods take turns on small pieces of the same images in one process; figures are CPU milliseconds an image, medians
over the rounds, and medians of the ratios within a round. Limits are this project's own bars.
"""

import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.nn.functional import interpolate

from launch.bench.loading import SIZE, measure_loaders, measure_reading, measure_resume, measure_transfer
from launch.bench.timing import in_turn, median_ratio
from shards.drawing import draw
from shards.writer import Sample, encoded, write_info, write_split
from toolkit.builder.metadata import cpu_name
from toolkit.data import decode
from toolkit.data.index import load_split
from toolkit.markdown import page, table
from toolkit.progress import tracked

LIMITS = {  # name in the result -> (at most or at least, limit)
    "transform_ratio_to_timm": ("<=", 0.75),
    "transform_ratio_to_limit": ("<=", 1 / 0.85),
    "read_ms": ("<=", 0.03),
    "transfer_ms": ("<=", 0.4),
    "transfer_ratio_to_float32": ("<=", 1 / 3),
    "loader_ratio_to_timm": (">=", 1.4),
    "loader_ratio_to_timm_normalised": (">=", 1.25),
    "worker_mib": ("<=", 250.0),
    "first_batch_after_resume_s": ("<=", 2.0),
    "psnr_db": (">=", 55.0),
}
_PIECE = 20  # images of one turn


def _drawn_jpegs(count: int) -> list[bytes]:
    """`count` drawn images, all of the JPEG quality that comes nearest to 107 KB."""
    drawn = [
        Image.fromarray(draw(number % 100, 375, 500, np.random.default_rng(number)))
        for number in tracked(range(count), "images", "drawing")
    ]

    def distance(quality: int) -> float:
        return abs(statistics.mean([len(encoded(image, "JPEG", quality=quality)) for image in drawn[:8]]) - 107_000)

    quality = min(range(60, 98), key=distance)
    return [encoded(image, "JPEG", quality=quality) for image in drawn]


def _write_shards(folder: Path, images: Sequence[bytes], repeats: int) -> None:
    """A data set of a training split of `repeats` times the images."""
    samples = [
        Sample(f"image{turn:02d}{number:05d}", number % 100, partial(bytes, data))
        for turn in range(repeats)
        for number, data in enumerate(images)
    ]
    write_info(folder, "bench", 100, {"train": write_split(folder, "train", "bench", samples, 6)}, synthetic=True)


def _measure_decoding(images: Sequence[bytes], rounds: int) -> dict[str, Any]:
    """Our transform against timm's own on uint8, and against the decoder's and the resize's bare calls."""
    ours = decode.TrainTransform(SIZE, interpolation="bilinear")
    theirs = create_transform(SIZE, is_training=True, use_prefetcher=True, interpolation="bilinear", color_jitter=0.0)
    rng = decode.sample_generator(0, 0, 0)
    crops = []
    for data in images:
        pixels = decode.decode_rgb(data)
        top, left, height, width = decode.random_crop_box(pixels, ours.scale, ours.ratio, rng)
        part = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        crops.append(torch.from_numpy(part).permute(2, 0, 1).unsqueeze(0))
    crops_in_turn = itertools.cycle(crops)

    def bare_decode(data: bytes) -> None:
        if decode.simplejpeg is None:
            np.array(Image.open(io.BytesIO(data)))
        else:
            decode.simplejpeg.decode_jpeg(data, colorspace="RGB")

    ways: dict[str, Callable[[bytes], Any]] = {
        "ours": lambda data: ours(decode.decode_rgb(data), rng),
        "timm": lambda data: theirs(Image.open(io.BytesIO(data)).convert("RGB")),
        "bare decode": bare_decode,
        "bare resize": lambda data: interpolate(next(crops_in_turn), SIZE, mode="bilinear", antialias=True),
    }
    times = in_turn({name: partial(_cpu_ms, way, images) for name, way in ways.items()}, rounds, "transforms")
    return {
        "transform_ms": {name: statistics.median(values) for name, values in times.items()},
        "transform_ratio_to_timm": median_ratio(times, "ours", "timm"),
        "transform_ratio_to_limit": median_ratio(times, "ours", "bare decode", "bare resize"),
        "psnr_db": _psnr(images[:60]),
    }


def _cpu_ms(function: Callable[[bytes], Any], images: Sequence[bytes], turn: int) -> float:
    """CPU ms an image over the turn's piece of the images."""
    part = [images[(turn * _PIECE + number) % len(images)] for number in range(_PIECE)]
    begin = time.process_time()
    for data in part:
        function(data)
    return 1e3 * (time.process_time() - begin) / _PIECE


def _psnr(images: Sequence[bytes]) -> float:
    """Peak signal-to-noise ratio in dB against PIL's decoder and its bilinear resize of the same crop."""
    rng, errors = decode.sample_generator(0, 0, 1), []
    for data in images:
        pixels = decode.decode_rgb(data)
        top, left, height, width = decode.random_crop_box(pixels, (0.08, 1.0), (0.75, 4 / 3), rng)
        mine = decode.resize(pixels[top : top + height, left : left + width], SIZE, "bilinear")
        box = (left, top, left + width, top + height)
        theirs = Image.open(io.BytesIO(data)).convert("RGB").resize(SIZE, Image.Resampling.BILINEAR, box=box)
        difference = mine.permute(1, 2, 0).numpy().astype(float) - np.asarray(theirs, dtype=float)
        errors.append(float((difference**2).mean()))
    return 10 * float(np.log10(255**2 / statistics.mean(errors)))


def bench_data(rounds: int, num_images: int = 200) -> dict[str, Any]:
    """Everything `launch.bench data` measures, as one JSON object."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    images = _drawn_jpegs(num_images)
    few = max(3, rounds // 5)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _write_shards(folder, images, 6)
        index = load_split(folder, "train")
        result = (
            _measure_decoding(images, 4 * rounds)
            | measure_reading(index, few)
            | measure_transfer(few)
            | measure_loaders(folder, index, max(3, rounds // 3))
            | measure_resume(folder, index)
        )
    torch.set_num_threads(threads)
    return {
        "schema": "bench-data/1",
        "rounds": rounds,
        "device": f"CPU: {cpu_name()}",
        "torch": torch.__version__,
        "decoder": "PIL" if decode.simplejpeg is None else "simplejpeg",
        "image_kb": statistics.mean(len(data) for data in images) / 1e3,
        **result,
        "bars": _bars(result),
    }


def _met(value: float | None, kind: str, limit: float) -> bool | None:
    """Whether a bar is met; None where it could not be measured."""
    return None if value is None else value <= limit if kind == "<=" else value >= limit


def _bars(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    bars = {
        name: {
            "value": result[name],
            "kind": kind,
            "limit": limit,
            "met": _met(result[name], kind, limit),
        }
        for name, (kind, limit) in LIMITS.items()
    }
    # A batch's way from the worker is bounded in time or, on a slow machine, beside float32's.
    either = bars["transfer_ms"]["met"] or bars["transfer_ratio_to_float32"]["met"]
    bars["transfer_ms"]["met"] = bars["transfer_ratio_to_float32"]["met"] = either
    return bars


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The table for results/bench/."""
    signs = {"<=": "≤", ">=": "≥"}
    words = {True: "met", False: "**missed**", None: "not measured: webdataset is not installed"}
    rows = [
        [
            name,
            "" if bar["value"] is None else f"{bar['value']:.3f}",
            f"{signs[bar['kind']]} {bar['limit']:.3g} {words[bar['met']]}",
        ]
        for name, bar in result["bars"].items()
    ]
    figures = {
        key: ", ".join(f"{name} {value:.2f}" for name, value in result[key].items())
        for key in ("transform_ms", "loader_ms")
    }
    return page(
        "# From the shard to the batch",
        "",
        f"{result['device']}, torch {result['torch']}, decoder {result['decoder']}; 500 × 375 JPEGs of "
        f"{result['image_kb']:.0f} KB, random resized crop to 224 and flip; CPU time. Made by `{command}`.",
        "",
        *table(["what", "value", "bar"], rows),
        "",
        f"Transform, CPU ms an image: {figures['transform_ms']}.",
        "",
        f"Whole loader, 2 workers: {figures['loader_ms']}.",
        "",
        f"Transfer is bounded in time or beside float32's {result['transfer_float32_ms']:.2f} ms. The first batch "
        "after a resume is timed at 90 % of 1,281,167 samples, less the "
        f"{result['first_batch_of_a_small_set_s']:.2f} s that workers and the first batch of a small set take. "
        "worker_mib: resident memory of a worker less that of `python -c 'import torch'`.",
    )
