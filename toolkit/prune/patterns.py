"""What goes together: single weights, N of M neighbours, or whole channels.

| pattern | unit | counted in |
| --- | --- | --- |
| `weight` | a weight | weights |
| `N:M`, as `2:4` | M neighbours along the input dimension, of which N survive | groups of M |
| `channel` | an output channel with all that depends on it | weights |

A group of N:M is M inputs of one output (and of one place of a convolution's kernel): what sparse kernels expect.
"""

import functools
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WEIGHT, CHANNEL = "weight", "channel"
LOWEST = -torch.finfo(torch.float32).max  # of scores: what goes after pruned weights, but before all others
_MOST = 16  # M at most


@dataclass(frozen=True)
class NOfM:
    """At most `kept` of `size` neighbours along dimension 1 survive."""

    kept: int
    size: int

    @property
    def gone(self) -> int:
        """Weights that a group loses."""
        return self.size - self.kept

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether dimension 1 of a weight is made of whole groups."""
        return len(shape) > 1 and shape[1] >= self.size and shape[1] % self.size == 0


def n_of_m(pattern: str) -> NOfM | None:
    """What N:M says, None for another pattern. Raises ValueError for one that is not known."""
    if pattern in (WEIGHT, CHANNEL):
        return None
    found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", str(pattern))
    if found is None or not 1 <= int(found[1]) < int(found[2]) <= _MOST:
        raise ValueError(
            f"pattern={pattern!r} is not known; choose {WEIGHT}, {CHANNEL}, or N:M with 1 <= N < M <= {_MOST}, as 2:4 "
            "(in YAML '2:4', or it is a number)"
        )
    return NOfM(int(found[1]), int(found[2]))


def sparsity_of(pattern: str, asked: float | None) -> float:
    """The final sparsity where `asked` may be left out: N:M says its own. Raises ValueError where the two differ."""
    kind = n_of_m(pattern)
    if asked is None or (kind is not None and asked != 0.0):
        if kind is None:
            if pattern == CHANNEL:
                raise ValueError(f"pattern={pattern!r} needs sparsity, for example 0.5 (0 = off)")
            return 0.0
        own = kind.gone / kind.size
        if asked is not None and not math.isclose(asked, own, abs_tol=1e-6):
            raise ValueError(
                f"sparsity={asked} is not that of pattern={pattern}; leave it out, or give {own:g} or 0 (off)"
            )
        return own
    return asked


def neighbour_distance(part: Tensor) -> int:
    """How far apart in memory order neighbours along dimension 1 are: 1 for channels_last, k·k for a plain k×k kernel.

    The M neighbours of a group are then view(-1, M, distance)[block, :, place] of the flat weight.
    """
    stride = part.stride()[1]
    within = (size for axis, size in enumerate(part.shape) if axis != 1 and size > 1 and part.stride()[axis] < stride)
    return math.prod(within)


def group_costs(scores: Tensor, kind: NOfM, distance: int) -> Tensor:
    """What each group loses, the sum of its lowest scores: float [n] -> float32 [n / M], in memory order.

    A score of -inf (pruned) or LOWEST (0 already) costs nothing. A group of which no other weight has to go costs -inf.
    NaN and +inf stay what they are.
    """
    ranked = _planes(scores, kind.size, distance)
    highest = functools.reduce(torch.maximum, ranked)
    cost, free = torch.zeros_like(highest), torch.ones_like(highest, dtype=torch.bool)
    for place in range(kind.gone):  # the next lowest comes to the front; a sort of short rows takes five times as long
        for behind in range(kind.size - 1, place, -1):
            one, other = ranked[behind - 1], ranked[behind]
            ranked[behind - 1], ranked[behind] = torch.minimum(one, other), torch.maximum(one, other)
        is_free = ranked[place] <= LOWEST
        cost += ranked[place].masked_fill(is_free, 0.0)
        free &= is_free
    cost.masked_fill_(free, -torch.inf)
    return torch.where(highest < torch.inf, cost, highest)


def group_losers(scores: Tensor, number: int, size: int, distance: int, chosen: Tensor) -> Tensor:
    """The `number` lowest of each chosen group, of equal ones the first: float [n], bool [n / size] -> bool [n]."""
    planes = _planes(scores, size, distance)
    ranks = [torch.zeros_like(planes[0], dtype=torch.int8) for _ in planes]  # how many are lower, or equal and before
    for one, other in itertools.combinations(range(size), 2):
        is_lower = planes[other] < planes[one]
        ranks[one] += is_lower
        ranks[other] += ~is_lower
    lost = torch.stack([chosen & (rank < number) for rank in ranks])
    return lost.view(size, -1, distance).movedim(0, 1).reshape(-1)


def _planes(scores: Tensor, size: int, distance: int) -> list[Tensor]:
    """The first of each group, the second of each, and so on: `size` tensors [n / size]."""
    return list(scores.view(-1, size, distance).movedim(1, 0).reshape(size, -1))
