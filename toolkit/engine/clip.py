"""Clipping of gradients, to the same bit on every engine.

A rank holds all of a gradient, whole rows of it, or a piece that begins and ends anywhere. Squares are added in float64
within a parameter (or a row of it), then over the ranks, then in the parameters' order: where a gradient is cut moves
such a sum by 1e-16 of it, which the factor, in the gradient's own precision, does not show.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_LEAST_WEIGHT, _LEAST_GRADIENT = 1e-3, 1e-6  # timm's: smaller norms count as these


@dataclass(frozen=True)
class Part:
    """What a rank holds of a parameter of shape `whole`, from its element `start` on: weights and their gradient.

    `gradient` is None where there is none, or nothing of it on this rank.
    """

    weight: Tensor
    gradient: Tensor | None
    start: int
    whole: torch.Size

    @property
    def num_rows(self) -> int:
        """Of the whole parameter: a layer's outputs; a vector is one row."""
        return self.whole[0] if len(self.whole) > 1 else 1

    @property
    def row_length(self) -> int:
        """Elements of a row."""
        return max(1, self.whole.numel() // self.num_rows)

    def add_row_squares(self, values: Tensor, sums: Tensor) -> None:
        """Add each row's sum of squares, as far as this part has it, to `sums`: float64 [num_rows]."""
        first, length = self.start // self.row_length, self.row_length
        rows = pad(values.reshape(-1), (self.start % length, -(self.start + values.numel()) % length)).view(-1, length)
        sums[first : first + len(rows)] += torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()

    def scale_rows(self, factors: Tensor) -> None:
        """Multiply the gradient by its rows' factors [num_rows]."""
        assert self.gradient is not None
        rows = torch.arange(self.start, self.start + self.gradient.numel(), device=factors.device) // self.row_length
        self.gradient.mul_(factors[rows].view(self.gradient.shape).to(self.gradient))


OverRanks = Callable[[Tensor], Tensor]  # sum over the ranks; the tensor itself where each rank has all


def total_norm(parts: Sequence[Part], device: torch.device, over_ranks: OverRanks) -> Tensor:
    """float64 []: the norm of all gradients together; `parts` are those of all parameters, in order."""
    squares = torch.zeros(len(parts), dtype=torch.float64, device=device)
    held = {number: part.gradient for number, part in enumerate(parts) if part.gradient is not None}
    if held:
        norms = torch._foreach_norm(list(held.values()), 2, torch.float64)
        squares[list(held)] = torch.stack(norms).square().to(device)
    return over_ranks(squares).sum().sqrt()


def clip(parts: Sequence[Part], norm: Tensor, limit: float, mode: str, over_ranks: OverRanks) -> None:
    """Clip gradients in place, as torch (norm, value) and timm (agc) do, where `norm` is that of all of them.

    norm: all are scaled so that their norm is at most `limit`.
    value: each element is brought to at most `limit` in size.
    agc: rows are scaled so that their norm is at most `limit` times that of their weights, but the last two
    parameters', which timm takes for the classifier's.
    """
    if mode == "agc":
        _clip_rows(parts[:-2], limit, norm.device, over_ranks)
        return
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        if part.gradient is not None and mode == "value":
            part.gradient.clamp_(-limit, limit)
        elif part.gradient is not None:
            part.gradient.mul_(factor.to(part.gradient))


def _clip_rows(parts: Sequence[Part], limit: float, device: torch.device, over_ranks: OverRanks) -> None:
    counts = [part.num_rows for part in parts]
    squares = torch.zeros(2, sum(counts), dtype=torch.float64, device=device)
    for part, sums in zip(parts, squares.split(counts, 1), strict=True):
        if part.gradient is not None:
            part.add_row_squares(part.weight, sums[0])
            part.add_row_squares(part.gradient, sums[1])
    weights, gradients = over_ranks(squares).sqrt()
    most = weights.clamp_min(_LEAST_WEIGHT) * limit
    factors = torch.where(gradients < most, 1.0, most / gradients.clamp_min(_LEAST_GRADIENT))
    for part, own in zip(parts, factors.split(counts), strict=True):
        if part.gradient is not None:
            part.scale_rows(own)
