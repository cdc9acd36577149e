"""From the shards to the batch: reading an image, its way from a worker, whole loaders, the first batch of a resume."""

import importlib.util
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_dataset, create_loader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from launch.bench.timing import in_turn, median_ratio
from toolkit.builder.data import to_inputs
from toolkit.data.decode import TrainTransform
from toolkit.data.index import ShardIndex
from toolkit.data.loader import TrainLoader, _Reader

SIZE = (224, 224)
_WORKERS = 2
_BATCH = 50


def measure_reading(index: ShardIndex, rounds: int) -> dict[str, float]:
    """CPU ms to read one image's bytes at a random place."""
    reader = _Reader(index, lambda image, rng: image, SIZE, 0, None)  # type: ignore[arg-type,return-value]
    order = np.random.default_rng(0).integers(0, len(index), 200).tolist()
    figures = []
    for _ in range(rounds):
        begin = time.process_time()
        for sample in order:
            reader.read(sample)
        figures.append(1e3 * (time.process_time() - begin) / len(order))
    return {"read_ms": statistics.median(figures)}


def _cpu_s() -> float:
    """CPU seconds of this process, of its living children, and of those that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    stats = (Path(f"/proc/{child.pid}/stat").read_text() for child in multiprocessing.active_children())
    ticks = (sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(ticks) / 100  # 100 a second on Linux


class _Ready(Dataset[Tensor]):
    """The same ready batch of 64 images, again and again."""

    def __init__(self, dtype: torch.dtype, steps: int) -> None:
        self._dtype, self._steps = dtype, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, number: int) -> Tensor:
        return torch.zeros(64, *SIZE, 3, dtype=self._dtype).permute(0, 3, 1, 2)


def _cpu_ms(batches: Callable[[int], Iterator[Tensor]], epoch: int) -> float:
    """CPU ms an image to take an epoch's batches from their workers."""
    begin, count = _cpu_s(), 0
    for images in batches(epoch):
        images[0, 0, 0, 0].item()
        count += len(images)
    return 1e3 * (_cpu_s() - begin) / count


def _after_the_first(ways: dict[str, Callable[[int], Iterator[Tensor]]], rounds: int, label: str) -> dict[str, Any]:
    """CPU ms an image of each way, a figure a round; the first starts the workers and is not counted."""
    times = in_turn({name: partial(_cpu_ms, way) for name, way in ways.items()}, rounds + 1, label)
    return {name: taken[1:] for name, taken in times.items()}


def measure_transfer(rounds: int) -> dict[str, float]:
    """CPU ms an image for a batch to come from a worker: uint8, as ours do, and float32."""

    def batches_of(dtype: torch.dtype) -> Callable[[int], Iterator[Tensor]]:
        loader = DataLoader(_Ready(dtype, 24), batch_size=None, num_workers=_WORKERS, persistent_workers=True)
        return lambda epoch: iter(loader)

    ways = {"uint8": batches_of(torch.uint8), "float32": batches_of(torch.float32)}
    times = _after_the_first(ways, rounds, "transfer")
    return {
        "transfer_ms": statistics.median(times["uint8"]),
        "transfer_float32_ms": statistics.median(times["float32"]),
        "transfer_ratio_to_float32": median_ratio(times, "uint8", "float32"),
    }


def _our_loader(index: ShardIndex, transform: TrainTransform) -> TrainLoader:
    return TrainLoader(
        index,
        transform,
        SIZE,
        seed=0,
        batch_size=_BATCH,
        accumulation=1,
        rank=0,
        num_ranks=1,
        workers=_WORKERS,
    )


def _timms_loader(folder: Path) -> Any:
    data = create_dataset("wds/", root=str(folder), split="train", is_training=True, batch_size=_BATCH)
    return create_loader(
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


def measure_loaders(folder: Path, index: ShardIndex, rounds: int) -> dict[str, Any]:
    """Whole loaders of two workers on the same shards: ours and timm's, as shipped and with normalised floats.

    The ratios to timm's are None where webdataset, by which it reads, is not installed.
    """
    ours = _our_loader(index, TrainTransform(SIZE, interpolation="bilinear"))
    theirs = _timms_loader(folder) if importlib.util.find_spec("webdataset") else None
    statistics_of_imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    normalise = to_inputs(statistics_of_imagenet, torch.nn.Linear(1, 1), channels_last=False)
    worker_mib = 0.0

    def shipped(epoch: int) -> Iterator[Tensor]:
        nonlocal worker_mib
        yield from (batch.images for batch in ours.epoch(epoch))
        workers = ours._loader._iterator._workers  # type: ignore[union-attr]
        worker_mib = max(worker_mib, *(_rss_mib(Path(f"/proc/{worker.pid}/status").read_text()) for worker in workers))

    ways: dict[str, Callable[[int], Iterator[Tensor]]] = {
        "ours": shipped,
        "ours, normalised": lambda epoch: (normalise(batch)[0] for batch in ours.epoch(epoch)),
    }
    if theirs is not None:
        ways["timm (normalises)"] = lambda epoch: (images for images, _ in theirs)
    times = _after_the_first(ways, rounds, "loaders")

    def ratio(mine: str) -> float | None:
        return None if theirs is None else 1 / median_ratio(times, mine, "timm (normalises)")

    bare = [sys.executable, "-c", "import torch; print(open('/proc/self/status').read())"]
    status = subprocess.run(bare, capture_output=True, text=True, check=True).stdout
    return {
        "loader_ms": {name: statistics.median(values) for name, values in times.items()},
        "loader_ratio_to_timm": ratio("ours"),
        "loader_ratio_to_timm_normalised": ratio("ours, normalised"),
        "worker_mib": worker_mib - _rss_mib(status),
    }


def _rss_mib(status: str) -> float:
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def measure_resume(folder: Path, index: ShardIndex) -> dict[str, float]:
    """Seconds to the first batch at 90 % of an epoch of ImageNet's length, beyond those of a small set."""
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

    def first_batch_s(used: ShardIndex, share: float) -> float:
        loader = _our_loader(used, TrainTransform(SIZE))
        begin = time.perf_counter()
        next(loader.epoch(3, int(loader.steps * share)))
        return time.perf_counter() - begin

    small = statistics.median(first_batch_s(index, 0.0) for _ in range(3))
    large = statistics.median(first_batch_s(whole, 0.9) for _ in range(3))
    return {"first_batch_after_resume_s": large - small, "first_batch_of_a_small_set_s": small}
