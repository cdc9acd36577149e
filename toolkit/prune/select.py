"""The k lowest scores over many tensors and ranks, exactly, never holding all scores: radix select on float bits.

A float32's bits, with the negative half mirrored, sort as the value does. Three histograms (11 + 11 + 10 bits, one
all-reduce each where the tensors are sharded) find the k-th key; scores equal to it are taken in order of (parameter,
rank, index), for which the ranks exchange their tie counts. Peak memory is a few chunks of scores.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from toolkit.kernels import native
from toolkit.prune.distributed import gather_over, sum_over

CHUNK = 262_144  # scores made at a time: 1 MiB of float32
_PASSES = ((21, 11), (10, 11), (0, 10))  # (bits to the right of the digit, bits of the digit)

_DIGIT_OF_INF = 0x7F800000 >> 21 | 1 << 10  # of the first pass; no finite score has it
_OUT_OF_REACH = torch.finfo(torch.float32).max  # +inf is refused
_CPU = torch.device("cpu")

Chunks = Callable[[], Iterable[Tensor]]


def _keys(scores: Tensor) -> Tensor:
    """float [n] -> int32 [n] that sorts like the value, as 0 .. 2^32 - 1 shifted by 2^31; -0.0 counts as 0.0."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(key: int) -> float:
    """The float32 of a key."""
    return torch.tensor(key ^ ((key >> 31) & 0x7FFFFFFF), dtype=torch.int32, device=_CPU).view(torch.float32).item()


def _add_histogram(scores: Tensor, shift: int, width: int, prefix: int, counts: Tensor) -> None:
    """Count one digit of the scores whose higher bits are `prefix`; the last count is that of NaN (first pass)."""
    if native.fits(scores) and scores.dtype is torch.float32:
        values = scores.numel(), scores.data_ptr()
        counts[-1] += native.native_code().bits_histogram(*values, shift, width, prefix, counts.data_ptr())
        return
    keys = _keys(scores)
    if shift + width == 32:
        counts[-1] += scores.isnan().sum()
        digit = (keys >> shift) + 2 ** (width - 1)
    else:
        digit = (keys[(keys >> (shift + width)) == prefix] >> shift) & (2**width - 1)
    counts += torch.bincount(digit, minlength=counts.numel())


@dataclass
class Threshold:
    """The k-th lowest score, and how many scores equal to it are still to be taken from each source of this rank.

    `take` must see a source's chunks in their order, each once.
    """

    value: float
    ties: list[int]

    def take(self, scores: Tensor, source: int) -> Tensor:
        """bool [n]: which of these scores of `source` are among the k lowest."""
        taken = scores < self.value
        if self.ties[source]:
            equal = (scores == self.value).nonzero().view(-1)[: self.ties[source]]
            taken[equal] = True
            self.ties[source] -= equal.numel()
        return taken


def _share_ties(own: Tensor, rest: int, group: ProcessGroup | None) -> list[int]:
    """Which of the scores equal to the threshold this rank takes: `rest` in order of (source, rank).

    `own` counts this rank's: int64 [sources].
    """
    counts = gather_over(group, own).T
    before = counts.flatten().cumsum(0).view(counts.shape) - counts
    return (rest - before).clamp(min=0).minimum(counts)[:, _rank_in(group)].tolist()


def _rank_in(group: ProcessGroup | None) -> int:
    return 0 if group is None else torch.distributed.get_rank(group)


def find_threshold(
    sources: Sequence[Chunks],
    names: Sequence[str],
    k: int,
    group: ProcessGroup | None = None,
    *,
    device: torch.device = _CPU,
    refuse_infinite: bool = False,
) -> Threshold:
    """Find what separates the `k` lowest scores, which are on `device`, from the rest.

    Each source yields one parameter's scores in chunks, the same ones each time it is called (three times here). With
    a `group` it yields this rank's shard of them, lower ranks holding lower indices, and `k` is over all ranks. Raises
    ValueError that names the parameter where a score is NaN, or on demand +inf, on every rank.
    """
    if k <= 0:
        return Threshold(-math.inf, [0] * len(sources))
    prefix = 0  # leading bits of the key found so far, signed as the keys are
    rest = k
    for number, (shift, width) in enumerate(_PASSES):
        # 1. Count this digit over all sources and ranks; refuse scores that say nothing.
        total, each = _count_digits(sources, shift, width, prefix, device)
        *histogram, nans = sum_over(group, total, device)
        if nans or (refuse_infinite and number == 0 and histogram[_DIGIT_OF_INF]):
            name, what = _first_not_finite(sources, names, group, device)
            raise ValueError(f"the pruning score of {name} is {what}; its weights, moments or gradients are not finite")
        assert number or k <= sum(histogram), f"asked for the {k} lowest of {sum(histogram)} scores"
        # 2. The k-th lowest has the digit at which the running count reaches k.
        found = 0
        while histogram[found] < rest:
            rest -= histogram[found]
            found += 1
        prefix = found - 2 ** (width - 1) if number == 0 else (prefix << width) | found
    # 3. With the last digit its value is known; what equals it is shared out in a fixed order.
    equal = [int(counts[digits == found].sum()) for digits, counts in each]
    return Threshold(_value(prefix), _share_ties(torch.tensor(equal, dtype=torch.int64, device=device), rest, group))


def _first_not_finite(
    sources: Sequence[Chunks], names: Sequence[str], group: ProcessGroup | None, device: torch.device
) -> tuple[str, str]:
    """(name, NaN or infinite) of the first source that has such a score on any rank."""
    for what, is_bad in (("NaN", torch.isnan), ("infinite", torch.isposinf)):
        counts = [sum(int(is_bad(scores).sum()) for scores in source()) for source in sources]
        for name, count in zip(names, sum_over(group, counts, device), strict=True):
            if count:
                return name, what
    raise AssertionError("all scores are finite")


def _count_digits(
    sources: Sequence[Chunks], shift: int, width: int, prefix: int, device: torch.device
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """This rank's counts of one digit: int64 [2^width + 1], the last that of NaN; and those of each source.

    The latter are of the last pass alone, which digits a source has and how often: whole histograms of 20,000 small
    tensors would take more memory than their weights.
    """
    total = torch.zeros(2**width + 1, dtype=torch.int64, device=device)
    each = []
    for source in sources:
        own = total if shift else torch.zeros_like(total)
        for scores in source():
            _add_histogram(scores, shift, width, prefix, own)
        if not shift:
            total += own
            digits = own.nonzero().view(-1)
            each.append((digits, own[digits]))
    return total, each


def choose_lowest(
    sources: Sequence[Chunks],
    names: Sequence[str],
    sizes: Sequence[int],
    k: int,
    group: ProcessGroup | None = None,
    device: torch.device = _CPU,
) -> Iterator[Tensor]:
    """Mark the `k` lowest scores: bool [size] of each source in turn, made as it is asked for.

    No source loses all its scores while another has some to give: the best of one that would is kept, and the next
    lowest elsewhere goes instead. Where fewer scores are left than sources, the best of the best sources are. `sizes`
    are this rank's; see `find_threshold` for `group` and `device`.
    """
    numbers = range(len(sources))
    highest = [-torch.inf] * len(sources)  # of each source over all ranks, known after the first look
    spared: dict[int, bool] = {}  # source -> whether this rank holds the score that is spared

    def guarded(number: int) -> Iterator[Tensor]:
        """The scores, with the highest of a spared source lifted out of reach."""
        look_for = highest[number] if spared.get(number) else None
        for scores in sources[number]():
            if not scores.numel():
                continue
            top = float(scores.max()) if look_for is not None or not spared else -torch.inf
            highest[number] = max(highest[number], top)
            if look_for is not None and top == look_for:
                scores = scores.index_fill(0, scores.argmax(), _OUT_OF_REACH)
                look_for = None
            yield scores

    chunks = [partial(guarded, number) for number in numbers]
    everywhere = sum_over(group, sizes, device)
    total, alive = sum(everywhere), sum(size > 0 for size in everywhere)
    while True:
        threshold = find_threshold(chunks, names, k, group, device=device, refuse_infinite=True)
        if len(sources) == 1 or k <= 0 or k == total:
            break
        holders = _holders(highest, group, device)
        emptied = {n for n in numbers if holders[n] is not None and highest[n] <= threshold.value} - spared.keys()
        if emptied and total - k < alive:
            best = sorted((n for n in numbers if holders[n] is not None), key=lambda n: (-highest[n], n))
            emptied = set(best[: total - k]) - spared.keys()
        if not emptied:
            break
        spared.update({number: bool(holders[number]) for number in emptied})
    for number in numbers:
        marks = [threshold.take(scores, number) for scores in chunks[number]()]
        yield torch.cat(marks) if marks else torch.zeros(0, dtype=torch.bool)


def _holders(highest: list[float], group: ProcessGroup | None, device: torch.device) -> list[bool | None]:
    """Whether this rank is the first that holds each source's highest score; None where a source has no scores.

    Brings `highest` to the maximum over the ranks.
    """
    every = gather_over(group, torch.tensor(highest, dtype=torch.float64, device=device))
    highest[:], first = every.max(0).values.tolist(), every.argmax(0).tolist()
    rank = _rank_in(group)
    return [holder == rank if value > -torch.inf else None for value, holder in zip(highest, first, strict=True)]
