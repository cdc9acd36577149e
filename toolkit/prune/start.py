"""A start with zeros: which weights of a fresh model are pruned before its first step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.prune.distribution import zero_quotas


def start_quotas(shapes: Sequence[Sequence[int]], sparsity: float, zeros_now: Sequence[int] | None = None) -> list[int]:
    """Zeros of each tensor at the start: floor(sparsity × weights) of all, by Erdos-Renyi-Kernel densities.

    Where there are `zeros_now` that stay, no tensor gets less, and all together no more unless these are more.
    As RigL starts (arXiv 1911.11134, section 3) and GraNet (2106.10404, section 3.2).
    """
    weights = sum(math.prod(shape) for shape in shapes)
    return zero_quotas("erk", shapes, zeros_now or [0] * len(shapes), math.floor(sparsity * weights))


@torch.no_grad()
def zero_smallest(weight: Tensor, count: int) -> None:
    """Set the `count` weights nearest to 0 to 0; of equal ones those that come first."""
    order = weight.detach().abs().flatten().sort(stable=True).indices
    gone = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    gone[order[:count]] = True
    weight.masked_fill_(gone.view(weight.shape), 0)
