"""The k lowest scores over many tensors, exactly, without ever holding all scores: radix select on float bits.

A float32's bits, with the negative half mirrored, sort as the value does. Three histograms (11 + 11 + 10 bits) find
the k-th key; scores equal to it are taken in order of (parameter, index). Peak memory is a few chunks of scores.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

__all__ = ["CHUNK", "Threshold", "choose_lowest", "find_threshold"]

CHUNK = 262_144  # scores made at a time: 1 MiB of float32 and 2 MiB of int64 bin numbers
_PASSES = ((21, 11), (10, 11), (0, 10))  # (bits to the right of the digit, bits of the digit)

Chunks = Callable[[], Iterable[Tensor]]


def _keys(scores: Tensor) -> Tensor:
    """float [n] -> int32 [n] that sorts like the value, as 0 .. 2^32 - 1 shifted by 2^31; -0.0 counts as 0.0."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@dataclass
class Threshold:
    """The k-th lowest key, and how many scores equal to it are still to be taken.

    `take` must see the chunks in the order `find_threshold` saw them, each once.
    """

    key: int | None
    ties: int

    def take(self, scores: Tensor) -> Tensor:
        """bool [n]: which of these scores are among the k lowest."""
        if self.key is None:
            return torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
        keys = _keys(scores)
        taken = keys < self.key
        if self.ties:
            equal = (keys == self.key).nonzero().view(-1)[: self.ties]
            taken[equal] = True
            self.ties -= equal.numel()
        return taken


def find_threshold(sources: Sequence[Chunks], names: Sequence[str], k: int) -> Threshold:
    """Find what separates the `k` lowest scores from the rest.

    Each source yields one parameter's scores in chunks, the same ones each time it is called (three times here).
    Raises ValueError that names the parameter where a score is NaN.
    """
    if k <= 0:
        return Threshold(None, 0)
    prefix = 0  # leading bits of the key found so far, signed as the keys are
    rest = k
    for number, (shift, width) in enumerate(_PASSES):
        histogram: Tensor | None = None
        total = 0
        for source, name in zip(sources, names, strict=True):
            for scores in source():
                if number == 0 and bool(scores.isnan().any()):
                    raise ValueError(f"the pruning score of {name} is NaN; its weights or moments are not finite")
                total += scores.numel()
                keys = _keys(scores)
                if number == 0:
                    digit = (keys >> shift) + 2 ** (width - 1)
                else:
                    digit = (keys[(keys >> (shift + width)) == prefix] >> shift) & (2**width - 1)
                counts = torch.bincount(digit, minlength=2**width)
                histogram = counts if histogram is None else histogram.add_(counts)
        assert histogram is not None, "no scores to select from"
        assert number or k <= total, f"asked for the {k} lowest of {total} scores"
        below = histogram.cumsum(0).tolist()
        found = next(index for index, count in enumerate(below) if count >= rest)
        rest -= below[found - 1] if found else 0
        prefix = found - 2 ** (width - 1) if number == 0 else (prefix << width) | found
    return Threshold(prefix, rest)


def choose_lowest(sources: Sequence[Chunks], names: Sequence[str], sizes: Sequence[int], k: int) -> Iterator[Tensor]:
    """Mark the `k` lowest scores: bool [size] of each source in turn, made as it is asked for.

    No source loses all its scores while another has some to give: the best of one that would is kept, and the next
    lowest elsewhere goes instead.
    """
    numbers = range(len(sources))
    highest = [-torch.inf] * len(sources)
    spared: set[int] = set()

    def guarded(number: int) -> Iterator[Tensor]:
        """The scores, with the highest of a spared source lifted out of reach."""
        look_for = highest[number] if number in spared else None
        for scores in sources[number]():
            top = float(scores.max()) if scores.numel() else -torch.inf
            highest[number] = max(highest[number], top)
            if look_for is not None and top == look_for:
                scores = scores.index_fill(0, scores.argmax(), torch.inf)
                look_for = None
            yield scores

    chunks = [partial(guarded, number) for number in numbers]
    while True:
        threshold = find_threshold(chunks, names, k)
        if len(sources) == 1 or threshold.key is None or sum(sizes) - k < sum(size > 0 for size in sizes):
            break
        limit = threshold.key
        emptied = {n for n in numbers if sizes[n] and int(_keys(torch.tensor([highest[n]]))) <= limit} - spared
        if not emptied:
            break
        spared |= emptied
    for number in numbers:
        marks = [threshold.take(scores) for scores in chunks[number]()]
        yield torch.cat(marks) if marks else torch.zeros(0, dtype=torch.bool)
