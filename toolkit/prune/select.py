"""The k lowest scores over many tensors and ranks, exactly, never holding all scores: radix select on float bits.

A float32's bits, with the negative half mirrored, sort as the value does. Three histograms (11 + 11 + 10 bits, one
all-reduce each where the tensors are sharded) find the k-th key; scores equal to it are taken in order of (parameter,
rank, index), for which the ranks exchange their tie counts. Peak memory is a few chunks of scores.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from toolkit.kernels import native
from toolkit.prune.distributed import gather_over, read_numbers, sum_over

CHUNK = 262_144  # scores made at a time on CPU: 1 MiB of float32
GPU_CHUNK = 16 * CHUNK  # on a GPU, where a launch costs as much as a million scores
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
        digit = torch.where((keys >> (shift + width)) == prefix, (keys >> shift) & (2**width - 1), -1)
    counts[:-1] += _count_values(digit, 2**width)


def _count_values(values: Tensor, number: int) -> Tensor:
    """How often each of 0 .. number - 1 is among int32 values, of which others are left out."""
    if values.device.type == "cpu":  # has no histc of integers, and a GPU waits twice in bincount
        return torch.bincount(values + 1, minlength=number + 1)[1:]
    return torch.histc(values, number, 0, number)


def chunk_size(device: torch.device) -> int:
    """Scores to make at a time."""
    return CHUNK if device.type == "cpu" else GPU_CHUNK


def _chunks_together(sources: Sequence[Chunks]) -> Iterator[Tensor]:
    """The chunks of all sources in order; on a GPU short ones are joined, for what follows is launches a chunk."""
    held: list[Tensor] = []
    for scores in (scores for source in sources for scores in source()):
        full = sum(map(len, held)) + len(scores) > chunk_size(scores.device)
        if held and (full or scores.device != held[0].device or scores.device.type == "cpu"):
            yield held[0] if len(held) == 1 else torch.cat(held)
            held = []
        held.append(scores)
    if held:
        yield held[0] if len(held) == 1 else torch.cat(held)


@dataclass
class Threshold:
    """The k-th lowest score, and how many scores equal to it are to be taken: None for all.

    Otherwise a number for each source of this rank, or one for all sources in turn. `take` must see the sources in
    their order, and the chunks of each, all of them once.
    """

    value: float
    ties: list[int] | None
    _seen: dict[int, Tensor] = field(default_factory=dict)  # scores equal to it so far, on a GPU

    def take(self, scores: Tensor, source: int) -> Tensor:
        """bool [n]: which of these scores of `source` are among the k lowest."""
        if self.ties is None:
            return scores <= self.value
        taken = scores < self.value
        number = source if len(self.ties) > 1 else 0
        if not self.ties[number] or not len(scores):
            return taken
        equal = scores == self.value
        if scores.device.type == "cpu":
            places = equal.nonzero().view(-1)[: self.ties[number]]
            self.ties[number] -= len(places)
            return taken.index_fill_(0, places, True)
        order = equal.cumsum(0)  # here the number left is not read, but compared with
        if number in self._seen:
            order += self._seen[number].to(order.device)
        self._seen[number] = order[-1]
        return taken.logical_or_(equal.logical_and_(order <= self.ties[number]))


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
        total = _count_digits(sources, shift, width, prefix, device)
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
    # 3. With the last digit its value is known. Of what equals it perhaps not all is taken, but the first; over ranks
    # those are known by a look at how many each has, always made, so that every update sends the same bytes.
    value = _value(prefix)
    if group is None:
        return Threshold(value, None if rest == histogram[found] else [rest])
    zero = torch.zeros((), dtype=torch.int64, device=device)
    equal = [sum(((scores == value).sum() for scores in source()), zero) for source in sources]
    return Threshold(value, _share_ties(torch.stack(equal), rest, group))


def _first_not_finite(
    sources: Sequence[Chunks], names: Sequence[str], group: ProcessGroup | None, device: torch.device
) -> tuple[str, str]:
    """(name, NaN or infinite) of the first source that has such a score on any rank."""
    for what, is_bad in (("NaN", torch.isnan), ("infinite", torch.isposinf)):
        counts = [sum(int(is_bad(scores).sum()) for scores in source()) for source in sources]  # the run ends here
        for name, count in zip(names, sum_over(group, counts, device), strict=True):
            if count:
                return name, what
    raise AssertionError("all scores are finite")


def _count_digits(sources: Sequence[Chunks], shift: int, width: int, prefix: int, device: torch.device) -> Tensor:
    """This rank's counts of one digit: int64 [2^width + 1], the last that of NaN."""
    total = torch.zeros(2**width + 1, dtype=torch.int64, device=device)
    for scores in _chunks_together(sources):
        own = total if scores.device == device else torch.zeros_like(total, device=scores.device)
        _add_histogram(scores, shift, width, prefix, own)
        if own is not total:  # a model over several devices
            total += own.to(device)
    return total


def choose_lowest(
    sources: Sequence[Chunks],
    names: Sequence[str],
    sizes: Sequence[int],
    k: int,
    group: ProcessGroup | None = None,
    device: torch.device = _CPU,
    *,
    keep_one: bool = True,
) -> Iterator[Tensor]:
    """Mark the `k` lowest scores: bool [size] of each source in turn, made as it is asked for.

    With `keep_one` no source loses all its scores while another has some to give: the best of one that would is kept,
    and the next lowest elsewhere goes instead. Where fewer scores are left than sources, the best of the best sources
    are. `sizes` are this rank's; see `find_threshold` for `group` and `device`.
    """
    numbers = range(len(sources))
    tops: list[tuple[int, int, Tensor]] = []  # (source, chunk, its highest score), made at the first look
    spared: dict[int, int | None] = {}  # source -> the chunk of the score that is spared, where this rank holds it
    seen: list[int] = []  # sources that have been looked at to their end

    def guarded(number: int) -> Iterator[Tensor]:
        """The scores, with the highest of a spared source lifted out of reach."""
        first_look, spare = len(seen) <= number, spared.get(number)
        for place, scores in enumerate(scores for scores in sources[number]() if scores.numel()):
            if first_look:
                tops.append((number, place, scores.max()))
            yield scores if place != spare else scores.index_fill(0, scores.argmax(), _OUT_OF_REACH)
        if first_look:
            seen.append(number)

    chunks = [partial(guarded, number) for number in numbers]
    everywhere = sum_over(group, sizes, device)
    total, alive = sum(everywhere), sum(size > 0 for size in everywhere)
    while True:
        threshold = find_threshold(chunks, names, k, group, device=device, refuse_infinite=True)
        if not keep_one or len(sources) == 1 or k <= 0 or k == total:
            break
        if not spared:
            highest, places = _holders(len(sources), tops, group, device)
        emptied = {n for n in numbers if highest[n] > -torch.inf and highest[n] <= threshold.value} - spared.keys()
        if emptied and total - k < alive:
            best = sorted((n for n in numbers if highest[n] > -torch.inf), key=lambda n: (-highest[n], n))
            emptied = set(best[: total - k]) - spared.keys()
        if not emptied:
            break
        spared.update({number: places[number] for number in emptied})
    for number, size in enumerate(sizes):
        marks, done = torch.zeros(0, dtype=torch.bool), 0
        for scores in chunks[number]():
            taken = threshold.take(scores, number)
            if len(taken) == size:  # all of them: a copy took a tenth of an update
                marks = taken
                continue
            marks = marks if done else taken.new_empty(size)
            marks[done : done + len(taken)] = taken
            done += len(taken)
        yield marks


def _holders(
    sources: int, tops: Sequence[tuple[int, int, Tensor]], group: ProcessGroup | None, device: torch.device
) -> tuple[list[float], list[int | None]]:
    """Each source's highest score over all ranks, -inf where it has none; the first chunk that has it, if it is here.

    `tops` are (source, chunk, highest) of this rank's chunks.
    """
    highest, places = [-torch.inf] * sources, [0] * sources
    values = read_numbers([top for _, _, top in tops])
    for (number, place, _), value in zip(tops, values, strict=True):
        if value > highest[number]:
            highest[number], places[number] = value, place
    if group is None:
        return highest, list(places)
    every = gather_over(group, torch.tensor(highest, dtype=torch.float64, device=device))
    highest, first = every.max(0).values.tolist(), every.argmax(0).tolist()
    rank = _rank_in(group)
    return highest, [place if holder == rank else None for place, holder in zip(places, first, strict=True)]
