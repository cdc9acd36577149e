"""Batches: a map-style data set whose item is one whole batch of this rank, assembled as uint8 in the worker.

torch returns map-style items in the sampler's order, so the batches do not depend on the number of workers, no worker
can be empty, and resuming at (epoch, step) reads nothing that is not trained on.
"""

import math
import os
import shutil
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from toolkit.data.decode import BadImageError, Transform, decode_rgb, sample_generator
from toolkit.data.index import ShardIndex
from toolkit.data.order import (
    PADDING,
    epoch_order,
    epoch_windows,
    evaluation_slices,
    micro_batch_slice,
    steps_per_epoch,
)
from toolkit.data.shard_cache import ShardCache
from toolkit.log import get_logger

_OPEN_FILES = 64  # of a worker; 1,024 shards would use up what a process may open
_COMPLAINTS = 5


class Batch(NamedTuple):
    """One micro-batch of one rank.

    images: uint8 [b, 3, h, w], channels last in memory; labels: int64 [b]; weights: float32 [b], 0 for padding and
    unreadable samples; samples: int64 [b], numbers in the index; num_bad: unreadable samples met.
    """

    images: Tensor
    labels: Tensor
    weights: Tensor
    samples: Tensor
    num_bad: int


class _Reader:
    """Reads and decodes single samples; files are opened on first use, so in the worker that uses them."""

    def __init__(
        self, index: ShardIndex, transform: Transform, size: tuple[int, int], seed: int, cache: ShardCache | None
    ) -> None:
        self.index = index
        self.transform = transform
        self.size = size
        self.seed = seed
        self.cache = cache
        self._files: dict[int, int] = {}  # the last used comes last
        self._complaints = 0

    def read(self, sample: int) -> bytes:
        """A sample's image bytes."""
        shard = int(self.index.shard[sample])
        file = self._files.pop(shard, None)
        if file is None:
            if self.cache is not None:
                self._close_forgotten()
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            file = (
                os.open(self.index.folder / self.index.names[shard], os.O_RDONLY)
                if self.cache is None
                else (self.cache.open(shard))
            )
        self._files[shard] = file
        return os.pread(file, int(self.index.size[sample]), int(self.index.offset[sample]))

    def _close_forgotten(self) -> None:
        """Close shards that were taken out of the cache: while open they still fill the disk."""
        for shard, file in list(self._files.items()):
            if not os.fstat(file).st_nlink:
                os.close(self._files.pop(shard))

    def complain(self, sample: int, error: BadImageError) -> None:
        """Say which image cannot be read, the first few times in this worker."""
        self._complaints += 1
        if self._complaints <= _COMPLAINTS:
            shard = self.index.folder / self.index.names[int(self.index.shard[sample])]
            more = "; further ones are only counted" if self._complaints == _COMPLAINTS else ""
            get_logger().warning(
                "unreadable image: number %d, in %s at byte %d (%s)%s",
                sample,
                shard,
                self.index.offset[sample],
                error,
                more,
            )

    def pixels(self, sample: int, epoch: int) -> Tensor:
        """uint8 [3, h, w]. Raises BadImageError for bytes that are not those indexed, or no image."""
        data = self.read(sample)
        if self.index.has_checksums and zlib.crc32(data) != int(
            self.index.crc32[sample]
        ):  # 0.06 ms for 107 KB; decoders accept flipped bytes
            raise BadImageError(f"sample {sample} does not match its checksum")
        return self.transform(decode_rgb(data), sample_generator(self.seed, epoch, sample))

    def empty(self, count: int) -> Tensor:
        """uint8 [count, 3, h, w] of zeros, channels last; shared memory in a worker, which saves a copy."""
        shape = (count, *self.size, 3)
        if torch.utils.data.get_worker_info() is None:
            return torch.zeros(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
        storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own default_collate does
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape).permute(0, 3, 1, 2)


class _TrainBatches(Dataset):
    """Item (epoch, step, micro) -> Batch; the order is rebuilt where the epoch changes, 40-85 ms for ImageNet."""

    def __init__(
        self, reader: _Reader, window: int | None, batch_size: int, accumulation: int, rank: int, num_ranks: int
    ) -> None:
        self.reader = reader
        self.window = window
        self.layout = {"batch_size": batch_size, "accumulation": accumulation, "rank": rank, "num_ranks": num_ranks}
        self._epoch = self._ahead = -1
        self._order = np.zeros(0, dtype=np.int64)
        self._windows: tuple[np.ndarray, list[list[int]]] = (self._order, [])

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, step, micro = key
        if epoch != self._epoch:
            lengths = self.reader.index.shard_lengths
            self._order = epoch_order(lengths, self.reader.seed, epoch, self.window)
            self._windows = epoch_windows(lengths, self.reader.seed, epoch, self.window or len(lengths))
            self._epoch, self._ahead = epoch, -1
        place_in_order = micro_batch_slice(step, micro, **self.layout)
        self._fetch_ahead(place_in_order.start)
        wanted = self._order[place_in_order]
        images = self.reader.empty(len(wanted))
        taken = wanted.copy()
        num_bad = 0
        for place in range(len(wanted)):
            # An unreadable sample is replaced by the next readable one of the same slice.
            for turn in range(len(wanted)):
                sample = int(wanted[(place + turn) % len(wanted)])
                try:
                    images[place] = self.reader.pixels(sample, epoch)
                except BadImageError as error:
                    if turn == 0:
                        num_bad += 1
                        self.reader.complain(sample, error)
                    continue
                taken[place] = sample
                break
            else:
                raise ValueError(f"no sample of step {step} in epoch {epoch} can be decoded; check the shards")
        labels = torch.from_numpy(self.reader.index.label[taken].astype(np.int64))
        return Batch(images, labels, torch.ones(len(taken)), torch.from_numpy(taken), num_bad)

    def _fetch_ahead(self, position: int) -> None:
        """Where a window begins, have its shards and the next window's fetched."""
        if self.reader.cache is None:
            return
        starts, groups = self._windows
        window = int(np.searchsorted(starts, position, side="right")) - 1
        if window > self._ahead:
            self._ahead = window
            self.reader.cache.prefetch([shard for group in groups[window : window + 2] for shard in group])


class _EvalBatches(Dataset):
    """Item step -> Batch, padded at the tail."""

    def __init__(self, reader: _Reader, slices: np.ndarray) -> None:
        self.reader = reader
        self.slices = slices

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, step: int) -> Batch:
        wanted = self.slices[step]
        if self.reader.cache is not None:
            first = int(self.reader.index.shard[max(0, int(wanted[0]))])
            self.reader.cache.prefetch(range(first, min(first + 3, len(self.reader.index.names))))
        images = self.reader.empty(len(wanted))
        weights = torch.zeros(len(wanted))
        num_bad = 0
        for place, sample in enumerate(wanted.tolist()):
            if sample == PADDING:
                continue
            try:
                images[place] = self.reader.pixels(sample, 0)
                weights[place] = 1.0
            except BadImageError as error:
                num_bad += 1
                self.reader.complain(sample, error)
        labels = torch.from_numpy(np.where(wanted == PADDING, 0, self.reader.index.label[wanted]).astype(np.int64))
        return Batch(images, labels, weights, torch.from_numpy(wanted.copy()), num_bad)


class _Keys(Sampler):
    """The (epoch, step, micro) still to be trained in an epoch."""

    def __init__(self, steps: int, accumulation: int) -> None:
        self.steps = steps
        self.accumulation = accumulation
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for step in range(self.start, self.steps):
            for micro in range(self.accumulation):
                yield self.epoch, step, micro

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulation


def _leave_signals_to_the_rank(worker: int) -> None:
    # A launcher's SIGTERM and the terminal's Ctrl-C go to the rank's process group; in a group of its own a worker
    # lives on while the rank finishes its step and saves. (Ignoring SIGTERM instead would hang the rank's exit.)
    os.setpgrp()


def _worker_options(workers: int, pin_memory: bool) -> dict[str, object]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": pin_memory,
        "batch_size": None,
        "worker_init_fn": _leave_signals_to_the_rank,
        # Each iter() draws a seed; from torch's global generator that would move dropout after a resume.
        "generator": torch.Generator(),
    }


def _with_room_named(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; where workers find no room in shared memory, an OSError that says how much there is."""
    try:
        yield from batches
    except RuntimeError as error:
        text = str(error)
        if not any(sign in text for sign in ("Bus error", "shared memory", "No space left on device")):
            raise
        room_kib = shutil.disk_usage("/dev/shm").total // 1024
        raise OSError(
            f"the data workers have no room for their batches in /dev/shm, which has {room_kib:,} KiB; use "
            "--workers 0, or make it larger (docker run --shm-size 8g)"
        ) from error


class TrainLoader:
    """This rank's micro-batches of an epoch, `accumulation` to an optimizer step."""

    def __init__(
        self,
        index: ShardIndex,
        transform: Transform,
        size: tuple[int, int],
        *,
        seed: int,
        batch_size: int,
        accumulation: int,
        rank: int,
        num_ranks: int,
        window: int | None = None,
        cache: ShardCache | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.index = index
        self.workers = workers
        self.accumulation = accumulation
        self.global_batch_size = batch_size * accumulation * num_ranks
        self.steps = steps_per_epoch(len(index), self.global_batch_size)
        if self.steps == 0:
            raise ValueError(
                f"{len(index)} training samples do not fill one global batch of {self.global_batch_size}; "
                f"lower -b or --global-batch-size to at most {len(index)}"
            )
        self._keys = _Keys(self.steps, accumulation)
        reader = _Reader(index, transform, size, seed, cache)
        batches = _TrainBatches(reader, window, batch_size, accumulation, rank, num_ranks)
        self._loader = DataLoader(batches, sampler=self._keys, **_worker_options(workers, pin_memory))  # type: ignore[arg-type]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of `epoch` from `start_step` on."""
        self._keys.epoch, self._keys.start = epoch, start_step
        return _with_room_named(iter(self._loader))


class EvalLoader:
    """This rank's evaluation batches: as many on every rank, every sample exactly once over all ranks."""

    def __init__(
        self,
        index: ShardIndex,
        transform: Transform,
        size: tuple[int, int],
        *,
        batch_size: int,
        rank: int,
        num_ranks: int,
        cache: ShardCache | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.num_samples = len(index)
        slices = evaluation_slices(len(index), batch_size, rank, num_ranks)
        batches = _EvalBatches(_Reader(index, transform, size, 0, cache), slices)
        self._loader = DataLoader(batches, **_worker_options(workers, pin_memory))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return _with_room_named(iter(self._loader))

    def __len__(self) -> int:
        return len(self._loader)
