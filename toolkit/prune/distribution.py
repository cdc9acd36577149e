"""Where weights compete: over all tensors (global), or within each under a quota of its own (layer, erk).

Quotas are whole numbers that add up to the zeros asked for, never take pruned weights back, and leave each tensor at
least one weight.
"""

import math
from collections.abc import Sequence

SCOPES = ("global", "layer", "erk")


def _erk_densities(shapes: Sequence[Sequence[int]], survivors: int) -> list[float]:
    """Erdos-Renyi-Kernel densities (RigL, arXiv 1911.11134, section 3): proportional to sum(shape) / prod(shape).

    Scaled so that `survivors` weights are left; tensors that would need more than all their weights stay dense.
    """
    counts = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / max(count, 1) for shape, count in zip(shapes, counts, strict=True)]
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        budget = survivors - sum(counts[i] for i in dense)
        total = sum(raw[i] * counts[i] for i in free)
        scale = budget / total if total else 0.0
        full = {i for i in free if raw[i] * scale >= 1.0}
        if not full:
            return [1.0 if i in dense else raw[i] * scale for i in range(len(shapes))]
        dense |= full


def zero_quotas(scope: str, shapes: Sequence[Sequence[int]], zeros_now: Sequence[int], zeros: int) -> list[int]:
    """Zeros of each tensor for `zeros` over all of them. `scope` is layer or erk.

    Rounded by largest remainder, at least `zeros_now`, at most all weights but one (all, where that cannot be).
    """
    counts = [math.prod(shape) for shape in shapes]
    if scope == "layer":
        share = zeros / max(sum(counts), 1)
        ideal = [share * count for count in counts]
    else:
        densities = _erk_densities(shapes, sum(counts) - zeros)
        ideal = [(1.0 - density) * count for density, count in zip(densities, counts, strict=True)]
    floor = 1 if zeros <= sum(max(count - 1, 0) for count in counts) else 0
    upper = [max(count - floor, 0, now) for count, now in zip(counts, zeros_now, strict=True)]
    quotas = [min(max(int(want), now), most) for want, now, most in zip(ideal, zeros_now, upper, strict=True)]
    missing = zeros - sum(quotas)
    step = 1 if missing > 0 else -1
    while missing:
        room = [i for i in range(len(quotas)) if (quotas[i] < upper[i] if step > 0 else quotas[i] > zeros_now[i])]
        if not room:
            break  # every tensor is at its bound: fewer zeros than now were asked for
        room.sort(key=lambda i: (step * (quotas[i] - ideal[i]), i))
        for i in room[: abs(missing)]:
            quotas[i] += step
            missing -= step
    return quotas
