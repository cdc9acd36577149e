"""Spread over seeds, and what may be said of a difference. Pure functions over mappings seed -> accuracy."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, sample standard deviation; None for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


SPREAD_FLOOR = 0.05  # percentage points


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences over common seeds, their standard deviation, and the mean's 95 % interval.

    The standard deviation is taken as SPREAD_FLOOR at least: accuracies are counts of whole images, and a few seeds
    that agree to the image agree by luck.

    With fewer than two common seeds there is no spread and nothing can be said: `spread` and `interval` are None.
    """

    mean: float
    spread: float | None
    interval: tuple[float, float] | None
    seeds: int

    @property
    def beyond_spread(self) -> bool:
        """Whether the mean is larger than the paired spread."""
        return self.spread is not None and abs(self.mean) > self.spread

    @property
    def beyond_noise(self) -> bool:
        """Whether the 95 % interval leaves out 0; two seeds are never enough."""
        return self.seeds >= 3 and self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def briefly(self) -> str:
        """The mean with its interval."""
        return f"{self.mean:+.2f}" + (f" [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]" if self.interval else "")

    def __str__(self) -> str:
        if self.spread is None or self.interval is None:
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} ± {self.spread:.2f} [{self.interval[0]:+.2f}, {self.interval[1]:+.2f}]"


def compare(mine: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """Paired by seed (Student's t on the differences). Raises ValueError without a common seed."""
    seeds = sorted(mine.keys() & other.keys())
    if not seeds:
        raise ValueError(f"no common seed between {sorted(mine)} and {sorted(other)}; run both with the same seeds")
    differences = [mine[seed] - other[seed] for seed in seeds]
    mean, spread = mean_and_spread(differences)
    if spread is None:
        return Difference(mean, None, None, len(seeds))
    spread = max(spread, SPREAD_FLOOR)
    from scipy.stats import t

    half = float(t.ppf(0.975, len(seeds) - 1)) * spread / math.sqrt(len(seeds))
    return Difference(mean, spread, (mean - half, mean + half), len(seeds))


def rank_ranges(results: Mapping[str, Mapping[int, float]]) -> dict[str, tuple[int, int]]:
    """(best, worst) rank of each method that its pairwise differences leave open.

    A method ranks below every other that is better, and above every other that is worse, where the difference stands
    among all pairs' (Holm 1979, family-wise error 5 %; at least three common seeds).
    """
    told_apart = _holm(results)
    ranges = {}
    for name, mine in results.items():
        found = [compare(mine, results[rival]).mean for rival in results if frozenset((name, rival)) in told_apart]
        better, worse = sum(mean > 0 for mean in found), sum(mean < 0 for mean in found)
        ranges[name] = (1 + worse, len(results) - better)
    return ranges


def _holm(results: Mapping[str, Mapping[int, float]]) -> set[frozenset[str]]:
    """Pairs whose difference from 0 is significant at 5 % over all pairs together."""
    from scipy.stats import t

    values: list[tuple[float, frozenset[str]]] = []
    for one, other in itertools.combinations(results, 2):
        if len(results[one].keys() & results[other].keys()) < 3:
            continue
        found = compare(results[one], results[other])
        assert found.spread is not None
        statistic = abs(found.mean) * math.sqrt(found.seeds) / found.spread
        values.append((2 * float(t.sf(statistic, found.seeds - 1)), frozenset((one, other))))
    told_apart = set()
    for number, (p, pair) in enumerate(sorted(values, key=lambda value: value[0])):
        if p > 0.05 / (len(values) - number):
            break
        told_apart.add(pair)
    return told_apart
