"""The k lowest scores over many tensors and ranks, exactly, never holding all scores: radix select on float bits.

A float32's bits, with the negative half mirrored, sort as the value does. Three histograms (11 + 11 + 10 bits, one
all-reduce each where the tensors are sharded) find the k-th key; scores equal to it are taken in order of (parameter,
rank, index), for which the ranks exchange their tie counts. Peak memory is a few chunks of scores.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from toolkit.kernels import bits as native_bits
from toolkit.prune.distributed import gather_over, sum_over

CHUNK = 262_144  # scores made at a time: 1 MiB of float32
_PASSES = ((21, 11), (10, 11), (0, 10))  # (bits to the right of the digit, bits of the digit)

_DIGIT_OF_INF = 0x7F800000 >> 21 | 1 << 10  # of the first pass; no finite score has it
_OUT_OF_REACH = torch.finfo(torch.float32).max  # +inf is refused

Chunks = Callable[[], Iterable[Tensor]]


def _keys(scores: Tensor) -> Tensor:
    """float [n] -> int32 [n] that sorts like the value, as 0 .. 2^32 - 1 shifted by 2^31; -0.0 counts as 0.0."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value(key: int) -> float:
    """The float32 of a key."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return float(struct.unpack("<f", struct.pack("<i", bits))[0])


def _add_histogram(scores: Tensor, shift: int, width: int, prefix: int, counts: Tensor) -> int:
    """Count one digit of the scores whose higher bits are `prefix`; returns how many are NaN (first pass)."""
    if native_bits.fits(scores) and scores.dtype is torch.float32:
        return native_bits.add_histogram(scores, shift, width, prefix, counts)
    keys = _keys(scores)
    nans = 0
    if shift + width == 32:
        nans = int(scores.isnan().sum())
        digit = (keys >> shift) + 2 ** (width - 1)
    else:
        digit = (keys[(keys >> (shift + width)) == prefix] >> shift) & (2**width - 1)
    counts += torch.bincount(digit, minlength=2**width)
    return nans


def _sum_over(group: ProcessGroup | None, values: Tensor) -> Tensor:
    if group is not None:
        torch.distributed.all_reduce(values, group=group)
    return values


@dataclass
class Threshold:
    """The k-th lowest score, and how many scores equal to it are still to be taken from each source of this rank.

    `take` must see a source's chunks in their order, each once.
    """

    value: float | None
    ties: list[int]

    def take(self, scores: Tensor, source: int) -> Tensor:
        """bool [n]: which of these scores of `source` are among the k lowest."""
        if self.value is None:
            return torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
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
    counts = own.unsqueeze(0)
    rank = 0
    if group is not None:
        counts = gather_over(group, own)
        rank = torch.distributed.get_rank(group)
    mine = []
    for column in counts.T.tolist():
        for number, count in enumerate(column):
            taken = min(rest, count)
            rest -= taken
            if number == rank:
                mine.append(taken)
    return mine


def find_threshold(
    sources: Sequence[Chunks],
    names: Sequence[str],
    k: int,
    group: ProcessGroup | None = None,
    *,
    refuse_infinite: bool = False,
) -> Threshold:
    """Find what separates the `k` lowest scores from the rest.

    Each source yields one parameter's scores in chunks, the same ones each time it is called (three times here). With
    a `group` it yields this rank's shard of them, lower ranks holding lower indices, and `k` is over all ranks. Raises
    ValueError that names the parameter where a score is NaN, or on demand +inf, on every rank.
    """
    if k <= 0:
        return Threshold(None, [0] * len(sources))
    prefix = 0  # leading bits of the key found so far, signed as the keys are
    rest = k
    ties: list[int] = []
    for number, (shift, width) in enumerate(_PASSES):
        # 1. Count this digit over all sources and ranks; refuse scores that say nothing.
        digits = _count_digits(sources, shift, width, prefix, group)
        *histogram, nans = _sum_over(group, digits.total_and_nans).tolist()
        if nans or (refuse_infinite and number == 0 and histogram[_DIGIT_OF_INF]):
            name, what = _first_not_finite(sources, names, group)
            raise ValueError(f"the pruning score of {name} is {what}; its weights, moments or gradients are not finite")
        assert number or k <= sum(histogram), f"asked for the {k} lowest of {sum(histogram)} scores"
        # 2. The k-th lowest has the digit at which the running count reaches k.
        found = 0
        while histogram[found] < rest:
            rest -= histogram[found]
            found += 1
        prefix = found - 2 ** (width - 1) if number == 0 else (prefix << width) | found
        # 3. With the last digit its value is known; what equals it is shared out in a fixed order.
        if number == len(_PASSES) - 1:
            ties = _share_ties(digits.of_each(found), rest, group)
    return Threshold(_value(prefix), ties)


def _first_not_finite(sources: Sequence[Chunks], names: Sequence[str], group: ProcessGroup | None) -> tuple[str, str]:
    """(name, NaN or infinite) of the first source that has such a score on any rank."""
    kinds = {"NaN": torch.isnan, "infinite": lambda scores: scores == torch.inf}
    device = _device_of(group) if group is not None else torch.device("cpu")
    for what, is_bad in kinds.items():
        counts = [sum(int(is_bad(scores).sum()) for scores in source()) for source in sources]
        for name, count in zip(names, sum_over(group, counts, device), strict=True):
            if count:
                return name, what
    raise AssertionError("all scores are finite")


@dataclass
class _Digits:
    """This rank's counts of one digit: int64 [2^width + 1], the last that of NaN.

    `each` has, of the last pass, which digits a source has and how often: whole histograms of 20,000 small tensors
    would take more memory than their weights.
    """

    total_and_nans: Tensor
    each: list[tuple[Tensor, Tensor] | None]

    def of_each(self, digit: int) -> Tensor:
        """int64 [sources]: how often each source has `digit`."""
        found = [0 if one is None else int(one[1][one[0] == digit].sum()) for one in self.each]
        return self.total_and_nans.new_tensor(found)


def _count_digits(
    sources: Sequence[Chunks], shift: int, width: int, prefix: int, group: ProcessGroup | None
) -> _Digits:
    counts: Tensor | None = None
    nans = 0
    each: list[tuple[Tensor, Tensor] | None] = []
    for source in sources:
        own: Tensor | None = None
        for scores in source():
            if counts is None:
                counts = torch.zeros(2**width, dtype=torch.int64, device=scores.device)
            if own is None:
                own = counts if shift else torch.zeros_like(counts)
            nans += _add_histogram(scores, shift, width, prefix, own)
        if shift or own is None or counts is None:
            each.append(None)
        else:
            counts += own
            digits = own.nonzero().view(-1)
            each.append((digits, own[digits]))
    if counts is None:
        assert group is not None, "no scores to select from"
        counts = torch.zeros(2**width, dtype=torch.int64, device=_device_of(group))
    return _Digits(torch.cat([counts, counts.new_tensor([nans])]), each)


def _device_of(group: ProcessGroup) -> torch.device:
    """Where a rank without any scores makes its part of a collective."""
    if torch.distributed.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def choose_lowest(
    sources: Sequence[Chunks],
    names: Sequence[str],
    sizes: Sequence[int],
    k: int,
    group: ProcessGroup | None = None,
) -> Iterator[Tensor]:
    """Mark the `k` lowest scores: bool [size] of each source in turn, made as it is asked for.

    No source loses all its scores while another has some to give: the best of one that would is kept, and the next
    lowest elsewhere goes instead. Where fewer scores are left than sources, the best of the best sources are. `sizes`
    are this rank's; see `find_threshold` for `group`.
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
    total, alive = _sizes_over(group, sizes)
    while True:
        threshold = find_threshold(chunks, names, k, group, refuse_infinite=True)
        if len(sources) == 1 or threshold.value is None or k == total:
            break
        holders = _holders(highest, group)
        emptied = {n for n in numbers if holders[n] is not None and highest[n] <= threshold.value} - spared.keys()
        if not emptied:
            break
        if total - k < alive:
            best = sorted((n for n in numbers if holders[n] is not None), key=lambda n: (-highest[n], n))
            emptied = set(best[: total - k]) - spared.keys()
            if not emptied:
                break
        spared.update({number: bool(holders[number]) for number in emptied})
    for number in numbers:
        marks = [threshold.take(scores, number) for scores in chunks[number]()]
        yield torch.cat(marks) if marks else torch.zeros(0, dtype=torch.bool)


def _sizes_over(group: ProcessGroup | None, sizes: Sequence[int]) -> tuple[int, int]:
    """(scores over all ranks, sources that have any)."""
    counts = sum_over(group, list(sizes), _device_of(group)) if group else sizes
    return sum(counts), sum(count > 0 for count in counts)


def _holders(highest: list[float], group: ProcessGroup | None) -> list[bool | None]:
    """Whether this rank is the first that holds each source's highest score; None where a source has no scores.

    Brings `highest` to the maximum over the ranks.
    """
    if group is None:
        return [True if value > -torch.inf else None for value in highest]
    rank = torch.distributed.get_rank(group)
    every = gather_over(group, torch.tensor(highest, dtype=torch.float64, device=_device_of(group)))
    top, first = every.max(0).values.tolist(), every.argmax(0).tolist()
    highest[:] = top
    return [holder == rank if value > -torch.inf else None for value, holder in zip(top, first, strict=True)]
