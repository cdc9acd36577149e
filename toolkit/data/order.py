"""Which sample comes when: pure functions of (seed, epoch). No rank, worker or world size decides the order.

Global step t of an epoch takes `order[t*G : (t+1)*G]`; rank r of R takes the r-th part of that slice. So the same
global batches appear whatever the number of ranks and workers, and resuming at (epoch, step) costs nothing.
"""

from collections.abc import Sequence

import numpy as np

PADDING = -1  # sample number of the padded tail in evaluation: weight 0


def generator(*key: int) -> np.random.Generator:
    """Random generator that depends on the key alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))


def epoch_order(shard_lengths: Sequence[int], seed: int, epoch: int, window: int | None = None) -> np.ndarray:
    """int64 [N]: permutation of all samples.

    Shards are permuted, and samples shuffled within each run of `window` permuted shards; None means over all of them,
    the full permutation (a local disk reads at random as fast as in sequence).
    """
    starts = np.concatenate([[0], np.cumsum(shard_lengths)])
    shards = generator(seed, epoch, 0).permutation(len(shard_lengths))
    window = len(shards) if window is None else window
    parts = []
    for first in range(0, len(shards), max(1, window)):
        samples = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]])
        generator(seed, epoch, 1, first).shuffle(samples)
        parts.append(samples)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def epoch_windows(
    shard_lengths: Sequence[int], seed: int, epoch: int, window: int
) -> tuple[np.ndarray, list[list[int]]]:
    """(int64 [windows + 1] where each window begins in the epoch's order, the shards of each)."""
    shards = generator(seed, epoch, 0).permutation(len(shard_lengths)).tolist()
    groups = [shards[first : first + window] for first in range(0, len(shards), window)]
    return np.cumsum([0, *(sum(shard_lengths[shard] for shard in group) for group in groups)]), groups


def micro_batch_slice(step: int, micro: int, *, batch_size: int, accumulation: int, rank: int, num_ranks: int) -> slice:
    """Part of an epoch's order that `rank` reads for micro-batch `micro` of global step `step`."""
    rank_share = batch_size * accumulation
    start = step * rank_share * num_ranks + rank * rank_share + micro * batch_size
    return slice(start, start + batch_size)


def repeated(positions: np.ndarray, global_batch_size: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Repeated augmentation: (places in an epoch's order, number of the copy), int64 [n] each, of n positions.

    A global batch has `repeats` copies of each of its images, so an epoch of as many steps takes that much fewer.
    Copies lie a round of images apart: on different ranks, where there are as many (as in timm's RepeatAugSampler).
    """
    images = -(-global_batch_size // repeats)
    steps, within = np.divmod(positions, global_batch_size)
    return steps * images + within % images, within // images


def evaluation_slices(num_samples: int, batch_size: int, rank: int, num_ranks: int) -> np.ndarray:
    """int64 [steps, batch_size]: this rank's samples, as many steps on every rank, PADDING at the tail."""
    steps = -(-num_samples // (batch_size * num_ranks))
    samples = np.full(steps * num_ranks * batch_size, PADDING, dtype=np.int64)
    samples[:num_samples] = np.arange(num_samples)
    return samples.reshape(steps, num_ranks, batch_size)[:, rank]
