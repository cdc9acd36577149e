"""Batches: a map-style data set whose item is one whole batch of this rank, assembled as uint8 in the worker.

torch returns map-style items in the sampler's order, so the batches do not depend on the number of workers, no worker
can be empty, and resuming at (epoch, step) reads nothing that is not trained on.
"""

import itertools
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from toolkit.data.decode import BadImageError, Transform, decode_rgb, sample_generator
from toolkit.data.index import ShardIndex
from toolkit.data.order import (
    PADDING,
    epoch_order,
    epoch_windows,
    evaluation_slices,
    micro_batch_slice,
    repeated,
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


@dataclass
class _Reader:
    """Reads and decodes samples; files are opened on first use, so in the worker that uses them."""

    index: ShardIndex
    transform: Transform
    size: tuple[int, int]
    seed: int
    cache: ShardCache | None
    _files: dict[int, int] = field(default_factory=dict)  # the last used comes last
    _complaints: int = 0

    def read(self, sample: int) -> bytes:
        """A sample's image bytes."""
        shard = int(self.index.shard[sample])
        file = self._files.pop(shard, None)
        if file is None:
            if self.cache is not None:
                # Shards that were taken out of the cache still fill the disk while they are open here.
                for gone in [number for number, known in self._files.items() if not os.fstat(known).st_nlink]:
                    os.close(self._files.pop(gone))
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            file = (
                os.open(self.index.folder / self.index.names[shard], os.O_RDONLY)
                if self.cache is None
                else (self.cache.open(shard))
            )
        self._files[shard] = file
        return os.pread(file, int(self.index.size[sample]), int(self.index.offset[sample]))

    def complain(self, sample: int, error: BadImageError) -> None:
        """Say which image cannot be read, the first few times in this worker."""
        self._complaints += 1
        if self._complaints <= _COMPLAINTS:
            get_logger().warning(
                "unreadable image: number %d, in %s at byte %d (%s)%s",
                sample,
                self.index.folder / self.index.names[int(self.index.shard[sample])],
                self.index.offset[sample],
                error,
                "; further ones are only counted" if self._complaints == _COMPLAINTS else "",
            )

    def pixels(self, sample: int, epoch: int, copy: int) -> Tensor:
        """uint8 [3, h, w]. Raises BadImageError for bytes that are not those indexed, or no image."""
        data = self.read(sample)
        if self.index.has_checksums and zlib.crc32(data) != int(
            self.index.crc32[sample]
        ):  # 0.06 ms for 107 KB; decoders accept flipped bytes
            raise BadImageError(f"sample {sample} does not match its checksum")
        return self.transform(decode_rgb(data), sample_generator(self.seed, epoch, sample, copy))

    def images(self, samples: np.ndarray, epoch: int, copies: np.ndarray | None = None) -> tuple[Tensor, np.ndarray]:
        """(uint8 [b, 3, h, w], bool [b]: which of them are there); padding and the unreadable are left black."""
        images, there = self.empty(len(samples)), np.zeros(len(samples), dtype=bool)
        for place in np.flatnonzero(samples != PADDING).tolist():
            sample = int(samples[place])
            try:
                images[place] = self.pixels(sample, epoch, 0 if copies is None else int(copies[place]))
                there[place] = True
            except BadImageError as error:
                self.complain(sample, error)
        return images, there

    def empty(self, count: int) -> Tensor:
        """uint8 [count, 3, h, w] of zeros, channels last; shared memory in a worker, which saves a copy."""
        shape = (count, *self.size, 3)
        if torch.utils.data.get_worker_info() is None:
            return torch.zeros(shape, dtype=torch.uint8).permute(0, 3, 1, 2)
        storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own default_collate does
        return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape).permute(0, 3, 1, 2)


@dataclass
class _TrainBatches(Dataset):
    """Item (epoch, step, micro) -> Batch; the order is rebuilt where the epoch changes, 40-85 ms for ImageNet.

    `place`: (step, micro) -> this rank's positions in an epoch; `repeat`: these -> (places in its order, copies).
    """

    reader: _Reader
    window: int | None
    place: Callable[[int, int], slice]
    repeat: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    _epoch: int = -1

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, step, micro = key
        if epoch != self._epoch:
            lengths = self.reader.index.shard_lengths
            self._order = epoch_order(lengths, self.reader.seed, epoch, self.window)
            self._windows = epoch_windows(lengths, self.reader.seed, epoch, self.window or len(lengths))
            self._epoch, self._ahead = epoch, -1
        place = self.place(step, micro)
        places, copies = self.repeat(np.arange(place.start, place.stop))
        self._fetch_ahead(int(places.min()))
        wanted = self._order[places]
        images, there = self.reader.images(wanted, epoch, copies)
        if not there.any():
            raise ValueError(f"no sample of step {step} in epoch {epoch} can be decoded; check the shards")
        # An unreadable sample is replaced by the next readable one of the same slice.
        good, bad = np.flatnonzero(there), np.flatnonzero(~there)
        substitutes = good[np.searchsorted(good, bad) % len(good)]
        images[bad] = images[substitutes]
        taken = wanted.copy()
        taken[bad] = wanted[substitutes]
        labels = torch.from_numpy(self.reader.index.label[taken].astype(np.int64))
        return Batch(images, labels, torch.ones(len(taken)), torch.from_numpy(taken), len(bad))

    def _fetch_ahead(self, position: int) -> None:
        """Where a window begins, have its shards and the next window's fetched."""
        starts, groups = self._windows
        window = int(np.searchsorted(starts, position, side="right")) - 1
        if self.reader.cache is not None and window > self._ahead:
            self._ahead = window
            self.reader.cache.prefetch([shard for group in groups[window : window + 2] for shard in group])


@dataclass
class _EvalBatches(Dataset):
    """Item step -> Batch, padded at the tail."""

    reader: _Reader
    slices: np.ndarray

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, step: int) -> Batch:
        wanted = self.slices[step]
        if self.reader.cache is not None:
            first = int(self.reader.index.shard[max(0, int(wanted[0]))])
            self.reader.cache.prefetch(range(first, min(first + 3, len(self.reader.index.names))))
        images, there = self.reader.images(wanted, 0)
        padding = wanted == PADDING
        labels = torch.from_numpy(np.where(padding, 0, self.reader.index.label[wanted]).astype(np.int64))
        num_bad = int((~there & ~padding).sum())
        return Batch(images, labels, torch.from_numpy(there).float(), torch.from_numpy(wanted.copy()), num_bad)


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
        repeats: int = 1,
        window: int | None = None,
        cache: ShardCache | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.index = index
        self.workers = workers
        self.global_batch_size = batch_size * accumulation * num_ranks
        self.steps = len(index) // self.global_batch_size  # what is over is left out, other samples each epoch
        if self.steps == 0:
            raise ValueError(
                f"{len(index)} training samples do not fill one global batch of {self.global_batch_size}; "
                f"lower -b or --global-batch-size to at most {len(index)}"
            )
        self._accumulation = accumulation
        self._keys: list[tuple[int, int, int]] = []  # (epoch, step, micro) still to be trained in an epoch
        layout = {"batch_size": batch_size, "accumulation": accumulation, "rank": rank, "num_ranks": num_ranks}
        reader = _Reader(index, transform, size, seed, cache)
        repeat = partial(repeated, global_batch_size=self.global_batch_size, repeats=repeats)
        batches = _TrainBatches(reader, window, partial(micro_batch_slice, **layout), repeat)
        self._loader = DataLoader(batches, sampler=self._keys, **_worker_options(workers, pin_memory))  # type: ignore[arg-type]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of `epoch` from `start_step` on."""
        self._keys[:] = itertools.product([epoch], range(start_step, self.steps), range(self._accumulation))
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
        reader = _Reader(index, transform, size, 0, cache)
        batches = _EvalBatches(reader, evaluation_slices(len(index), batch_size, rank, num_ranks))
        self._loader = DataLoader(batches, **_worker_options(workers, pin_memory))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        return _with_room_named(iter(self._loader))

    def __len__(self) -> int:
        return len(self._loader)
