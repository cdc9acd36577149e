"""`python -m launch.bench data`: what an image costs from the shard to the batch, beside timm's own way.

Images are 500 × 375 JPEGs of about 107 KB (drawn; ImageNet's mean is 110 KB), random resized crop to 224 and flip.
All methods take turns on small pieces of the same images in one process; figures are CPU milliseconds an image, medians
over the rounds, and medians of the ratios within a round. Limits are this project's own bars.
"""

import io
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from toolkit.data.index import ShardIndex

__all__ = ["LIMITS", "bench_data", "to_markdown"]

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
SIZE = (224, 224)
_WORKERS = 2
_BATCH = 50


def _images(count: int, log: Callable[[str], None]) -> list[bytes]:
    """`count` drawn JPEGs of about 107 KB."""
    import numpy as np
    from PIL import Image

    from shards.synthetic import draw

    drawn = []
    for number in range(count):
        if number % 50 == 0:
            log(f"drawing image {number} of {count}")
        drawn.append(draw(number % 100, 375, 500, np.random.default_rng(number)))

    def encode(pixels: "np.ndarray", quality: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()

    def distance(quality: int) -> float:
        return abs(statistics.mean(len(encode(pixels, quality)) for pixels in drawn[:8]) - 107_000)

    quality = min(range(60, 98), key=distance)
    return [encode(pixels, quality) for pixels in drawn]


def _write_shards(folder: Path, images: Sequence[bytes], repeats: int) -> None:
    from shards.writer import Sample, write_info, write_split

    samples = [
        Sample(f"image{turn:02d}{number:05d}", number % 100, partial(bytes, data))
        for turn in range(repeats)
        for number, data in enumerate(images)
    ]
    split = write_split(folder, "train", "bench", samples, 6)
    write_info(folder, "bench", 100, {"train": split}, synthetic=True)


def _interleave(
    functions: dict[str, Callable[[bytes], Any]], images: Sequence[bytes], rounds: int, piece: int = 20
) -> dict[str, list[float]]:
    """CPU ms an image of each function, one figure a piece: every function takes a piece before the next begins."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        part = [images[(turn * piece + number) % len(images)] for number in range(piece)]
        for name, function in functions.items():
            begin = time.process_time()
            for data in part:
                function(data)
            times[name].append(1e3 * (time.process_time() - begin) / piece)
    return times


def _ratio(times: dict[str, list[float]], mine: str, *others: str) -> float:
    """Median over the pieces of mine / sum of the others."""
    return statistics.median(
        value / sum(parts) for value, *parts in zip(times[mine], *(times[name] for name in others), strict=True)
    )


def _decoding(images: Sequence[bytes], rounds: int) -> dict[str, Any]:
    """The transform against timm's own on uint8, and against the decoder's and the resize's bare calls."""
    import numpy as np
    import torch
    from PIL import Image
    from timm.data import create_transform

    from toolkit.data import decode

    ours = decode.TrainTransform(SIZE, interpolation="bilinear")
    theirs = create_transform(SIZE, is_training=True, use_prefetcher=True, interpolation="bilinear", color_jitter=0.0)
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
        torch.nn.functional.interpolate(crops[next(turn) % len(crops)], SIZE, mode="bilinear", antialias=True)

    times = _interleave(
        {
            "ours": lambda data: ours(decode.decode_rgb(data), rng),
            "timm": lambda data: theirs(Image.open(io.BytesIO(data)).convert("RGB")),
            "bare decode": bare_decode,
            "bare resize": bare_resize,
        },
        images,
        rounds,
    )
    return {
        "transform_ms": {name: statistics.median(values) for name, values in times.items()},
        "transform_ratio_to_timm": _ratio(times, "ours", "timm"),
        "transform_ratio_to_limit": _ratio(times, "ours", "bare decode", "bare resize"),
        "psnr_db": _psnr(images[:60]),
    }


def _psnr(images: Sequence[bytes]) -> float:
    """Peak signal-to-noise ratio in dB against PIL's decoder and its bilinear resize of the same crop."""
    import numpy as np
    from PIL import Image

    from toolkit.data import decode

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


def _reading(index: "ShardIndex", rounds: int) -> float:
    """CPU ms to read one image's bytes at a random place."""
    import numpy as np

    from toolkit.data.loader import _Reader

    reader = _Reader(index, lambda image, rng: image, SIZE, 0, None)  # type: ignore[arg-type,return-value]
    order = np.random.default_rng(0).integers(0, len(index), 200).tolist()
    figures = []
    for _ in range(max(3, rounds // 5)):
        begin = time.process_time()
        for sample in order:
            reader.read(sample)
        figures.append(1e3 * (time.process_time() - begin) / len(order))
    return statistics.median(figures)


def _cpu_s() -> float:
    """CPU seconds of this process, of its living children, and of those that have ended."""
    total = time.process_time()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total += ended.ru_utime + ended.ru_stime
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / 100  # clock ticks; 100 a second on Linux
    return total


def _batches_of(dtype: "torch.dtype", steps: int) -> Any:
    """A loader whose workers hand over the same ready batch of 64 images."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    class Ready(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return steps

        def __getitem__(self, number: int) -> torch.Tensor:
            return torch.zeros(64, *SIZE, 3, dtype=dtype).permute(0, 3, 1, 2)

    return DataLoader(Ready(), batch_size=None, num_workers=_WORKERS, persistent_workers=True)


def _transfer(rounds: int) -> dict[str, float]:
    """CPU ms an image for a batch to come from a worker: uint8, as ours do, and float32."""
    import torch

    steps = 24
    loaders = {"uint8": _batches_of(torch.uint8, steps), "float32": _batches_of(torch.float32, steps)}
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(max(3, rounds // 5) + 1):
        for name, loader in loaders.items():
            begin = _cpu_s()
            for batch in loader:
                batch[0, 0, 0, 0].item()
            if turn:  # the first starts the workers
                times[name].append(1e3 * (_cpu_s() - begin) / steps / 64)
    return {
        "transfer_ms": statistics.median(times["uint8"]),
        "transfer_float32_ms": statistics.median(times["float32"]),
        "transfer_ratio_to_float32": _ratio(times, "uint8", "float32"),
    }


def _loaders(folder: Path, index: "ShardIndex", rounds: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Whole loaders of two workers on the same shards: ours and timm's, as shipped and with normalised floats."""
    import torch
    from timm.data import create_dataset, create_loader

    from toolkit.builder.data import to_inputs
    from toolkit.data.decode import TrainTransform
    from toolkit.data.loader import TrainLoader

    ours = TrainLoader(
        index,
        TrainTransform(SIZE, interpolation="bilinear"),
        SIZE,
        seed=0,
        batch_size=_BATCH,
        accumulation=1,
        rank=0,
        num_ranks=1,
        workers=_WORKERS,
    )
    data = create_dataset("wds/", root=str(folder), split="train", is_training=True, batch_size=_BATCH)
    theirs = create_loader(
        data,
        (3, *SIZE),
        _BATCH,
        is_training=True,
        use_prefetcher=True,
        interpolation="bilinear",
        color_jitter=0.0,
        num_workers=_WORKERS,
        device=torch.device("cpu"),
        persistent_workers=True,
        pin_memory=False,
    )
    statistics_of_imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    normalise = to_inputs(statistics_of_imagenet, torch.nn.Linear(1, 1), channels_last=False)

    def shipped(epoch: int) -> Iterator[torch.Tensor]:
        yield from (batch.images for batch in ours.epoch(epoch))

    def normalised(epoch: int) -> Iterator[torch.Tensor]:
        yield from (normalise(batch)[0] for batch in ours.epoch(epoch))

    def timms(epoch: int) -> Iterator[torch.Tensor]:
        yield from (images for images, _ in theirs)

    ways = {"ours": shipped, "ours, normalised": normalised, "timm (normalises)": timms}
    times: dict[str, list[float]] = {name: [] for name in ways}
    worker_mib = 0.0
    for turn in range(rounds + 1):
        for name, way in ways.items():
            log(f"loaders, round {turn} of {rounds}: {name}")
            begin, count = _cpu_s(), 0
            for images in way(turn):
                count += len(images)
            if turn:  # the first starts the workers and fills timm's buffers
                times[name].append(1e3 * (_cpu_s() - begin) / count)
            if name == "ours":
                worker_mib = max(worker_mib, max(_rss_mib(pid) for pid in _worker_pids(ours)))
    bare = subprocess.run(
        [sys.executable, "-c", "import torch, os; print(open(f'/proc/{os.getpid()}/status').read())"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "loader_ms": {name: statistics.median(values) for name, values in times.items()},
        "loader_ratio_to_timm": 1 / _ratio(times, "ours", "timm (normalises)"),
        "loader_ratio_to_timm_normalised": 1 / _ratio(times, "ours, normalised", "timm (normalises)"),
        "worker_mib": worker_mib - _rss_of(bare.stdout),
    }


def _worker_pids(loader: Any) -> list[int]:
    return [worker.pid for worker in loader._loader._iterator._workers]


def _rss_mib(pid: int) -> float:
    return _rss_of(Path(f"/proc/{pid}/status").read_text())


def _rss_of(status: str) -> float:
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def _resume(folder: Path, index: "ShardIndex") -> dict[str, float]:
    """Seconds to the first batch at 90 % of an epoch of ImageNet's length, beyond those of a small set."""
    import numpy as np

    from toolkit.data.decode import TrainTransform
    from toolkit.data.index import ShardIndex
    from toolkit.data.loader import TrainLoader

    count, shards = 1_281_167, 1_024
    rows = np.arange(count) % int((index.shard == 0).sum())  # every shard is the same file
    whole = ShardIndex(
        folder,
        (index.names[0],) * shards,
        (index.shard_bytes[0],) * shards,
        shard=np.sort(np.arange(count) % shards).astype(np.int32),
        offset=index.offset[rows],
        size=index.size[rows],
        label=index.label[rows],
        crc32=index.crc32[rows],
    )

    def first_batch(used: ShardIndex, share: float) -> float:
        loader = TrainLoader(
            used,
            TrainTransform(SIZE),
            SIZE,
            seed=0,
            batch_size=_BATCH,
            accumulation=1,
            rank=0,
            num_ranks=1,
            workers=_WORKERS,
        )
        begin = time.perf_counter()
        next(loader.epoch(3, int(loader.steps * share)))
        return time.perf_counter() - begin

    small = statistics.median(first_batch(index, 0.0) for _ in range(3))
    large = statistics.median(first_batch(whole, 0.9) for _ in range(3))
    return {"first_batch_after_resume_s": large - small, "first_batch_of_a_small_set_s": small}


def bench_data(rounds: int, log: Callable[[str], None], num_images: int = 200) -> dict[str, Any]:
    """Everything `launch.bench data` measures, as one JSON object."""
    import torch

    from toolkit.builder.metadata import cpu_name
    from toolkit.data import decode
    from toolkit.data.index import load_split

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    images = _images(num_images, log)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _write_shards(folder, images, 6)
        index = load_split(folder, "train")
        log("transforms")
        result = _decoding(images, 4 * rounds) | {"read_ms": _reading(index, rounds)}
        log("transfer")
        result |= _transfer(rounds) | _loaders(folder, index, max(3, rounds // 3), log)
        log("resume")
        result |= _resume(folder, index)
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


def _bars(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    bars = {}
    for name, (kind, limit) in LIMITS.items():
        met = result[name] <= limit if kind == "<=" else result[name] >= limit
        bars[name] = {"value": result[name], "kind": kind, "limit": limit, "met": met}
    # A batch's way from the worker is bounded in time or, on a slow machine, beside float32's.
    either = bars["transfer_ms"]["met"] or bars["transfer_ratio_to_float32"]["met"]
    bars["transfer_ms"]["met"] = bars["transfer_ratio_to_float32"]["met"] = either
    return bars


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The table for results/bench/."""
    lines = [
        "# From the shard to the batch",
        "",
        f"{result['device']}, torch {result['torch']}, decoder {result['decoder']}; 500 × 375 JPEGs of "
        f"{result['image_kb']:.0f} KB, random resized crop to 224 and flip; CPU time. Made by `{command}`.",
        "",
        "| what | value | bar |",
        "| --- | ---: | ---: |",
    ]
    for name, bar in result["bars"].items():
        sign = "≤" if bar["kind"] == "<=" else "≥"
        lines.append(
            f"| {name} | {bar['value']:.3f} | {sign} {bar['limit']:.3g} {'met' if bar['met'] else '**missed**'} |"
        )
    for title, key in (("Transform, CPU ms an image", "transform_ms"), ("Whole loader, 2 workers", "loader_ms")):
        lines += ["", f"{title}: " + ", ".join(f"{name} {value:.2f}" for name, value in result[key].items()) + "."]
    lines += [
        "",
        f"Transfer is bounded in time or beside float32's {result['transfer_float32_ms']:.2f} ms. The first batch "
        "after a resume is timed at 90 % of 1,281,167 samples, less the "
        f"{result['first_batch_of_a_small_set_s']:.2f} s that workers and the first batch of a small set take. "
        "worker_mib: resident memory of a worker less that of `python -c 'import torch'`.",
    ]
    return "\n".join(lines) + "\n"
