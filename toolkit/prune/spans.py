"""Where blocks and groups of a part begin: at the same weights however its parameters are cut over ranks.

A part is what a rank holds of a tensor: all of it, FSDP2's rows, or ZeRO's flat slice of several parameters. Its spans
lie one behind the other; blocks of 1,024 weights and groups of 256 are counted from each span's begin. A parameter that
is cut within a group has a span up to the group's end and one from there on, so that all but the group that is cut are
those of the whole parameter:

    part     | p1, cut at its weight 992       | p2 from its weight 0     | padding |
    spans    | 32 weights | from weight 1,024  | p2                       |         |

A span begins with a word of the mask: what does not begin at a multiple of 32 in the part goes on with the span before,
in groups of the part's own.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from toolkit.kernels.narrow import GROUP, num_groups
from toolkit.prune.distributed import first_weight, to_local

# Weights an entry of the offsets covers. One int32 for 1,024 weights costs 0.0039 bytes a weight, and lets a kernel
# start at any block without counting the bits before it.
BLOCK = 1024
_WORD = 32  # weights whose bits a kernel reads at once, at a multiple of four bytes


class Range(NamedTuple):
    """The weights `first` to `last` of a part, which are parameter `name`'s from its weight `place` on.

    `number` is the parameter's number among all the optimizer's, where it is not the optimizer that shows it.
    """

    name: str
    first: int
    last: int
    place: int = 0
    number: int | None = None


class Span(NamedTuple):
    """Weights `first` to `last` of a part, `place` and `number` as a Range's; `block` and `group`: its first ones."""

    first: int
    last: int
    place: int = 0
    number: int | None = None
    block: int = 0
    group: int = 0

    @property
    def numel(self) -> int:
        """Its weights."""
        return self.last - self.first

    @property
    def blocks(self) -> int:
        """Entries of the offsets."""
        return -(-self.numel // BLOCK)

    @property
    def groups(self) -> int:
        """Exponents of a coded moment."""
        return num_groups(self.numel)


Spans = Sequence[Span]
# What a part holds of each parameter of its group, in order, also of those of which it holds nothing. What no range
# covers is padding, no weights.
Ranges = Sequence[Range]


def whole_range(parameter: Tensor, name: str = "") -> list[Range]:
    """Of a parameter that the optimizer itself shows: this rank's part of it."""
    return [Range(name, 0, to_local(parameter).numel(), first_weight(parameter))]


def make_spans(numel: int, ranges: Ranges) -> list[Span]:
    """The spans of a part of `numel` weights."""
    begins: dict[int, tuple[int, int | None]] = {0: (0, None)}
    for _, first, last, place, number in ranges:
        border = -place % GROUP
        for begin in (0, border):
            if first + begin < last:
                begins[first + begin] = place + begin, number
        begins.setdefault(last, (0, None))
    firsts = sorted(first for first in begins if first < max(numel, 1) and not first % _WORD)
    spans: list[Span] = []
    for first, last in zip(firsts, [*firsts[1:], numel], strict=True):
        before = spans[-1] if spans else Span(0, 0)
        counts = before.block + before.blocks, before.group + before.groups
        spans.append(Span(first, last, *begins[first], *counts))
    return spans


def num_blocks_of(spans: Spans) -> int:
    """Entries of the offsets of all spans."""
    return spans[-1].block + spans[-1].blocks


def num_groups_of(spans: Spans) -> int:
    """Exponents of a coded moment of all spans."""
    return spans[-1].group + spans[-1].groups


def span_at(spans: Spans, position: int) -> Span:
    """The span with the weight at `position` of the part."""
    return spans[bisect.bisect_right(spans, position, key=lambda span: span.first) - 1]
