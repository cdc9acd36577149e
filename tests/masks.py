"""Whether two ways to make an update choose the same masks, but where rounding decides: at the threshold."""

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.prune.groups import prunable_parameters
from toolkit.prune.mask import flat_view, unpack_bits
from toolkit.prune.scores import STATE_SCORES

# By which two runs' scores may differ. Of 5.5 million weights' scores in float32, native code's differ from the
# reference's by 3.8 at most; in bfloat16 a weight or moment is now and then rounded the other way.
FEW_ULPS = {torch.float32: 8, torch.bfloat16: 4}


@dataclass
class MaskUpdate:
    """Of all prunable weights: the scores that a mask update chose by, -inf where pruned before, and what it kept."""

    scores: Tensor
    kept: Tensor


def watch_mask_updates(optimizer) -> list[MaskUpdate]:
    """The list to which each mask update of a packed optimizer adds itself from now on."""
    updates, update = [], optimizer.pruning.update

    def watched(step):
        scores = _scores(optimizer)
        changed = update(step)
        updates.append(MaskUpdate(scores, _kept(optimizer)))
        return changed

    optimizer.pruning.update = watched
    return updates


def _prunable(optimizer):
    return [parameter for _, parameter in prunable_parameters(optimizer.param_groups)]


def _kept(optimizer):
    masks = dict(optimizer.pruning.masks())
    found = []
    for parameter in _prunable(optimizer):
        every = torch.ones(parameter.numel(), dtype=torch.bool, device=parameter.device)
        found.append(unpack_bits(masks[parameter], parameter.numel()) if parameter in masks else every)
    return torch.cat(found)


def _scores(optimizer):
    numbers = {p: number for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    states, score = optimizer.state_dict()["state"], STATE_SCORES[optimizer.pruning.options.score]
    found = []
    for parameter in _prunable(optimizer):
        weight = flat_view(parameter.detach())
        state = states[numbers[parameter]]  # made on the host
        moments = {key: flat_view(value).to(weight.device) for key, value in state.items() if value.ndim}
        found.append(score(weight, moments).masked_fill(weight == 0, -torch.inf))
    return torch.cat(found)


def check_masks(mine: list[MaskUpdate], wanted: list[MaskUpdate], dtype: torch.dtype = torch.float32) -> int:
    """Raise AssertionError where one keeps a weight and the other does not, unless its score is at the threshold.

    By the scores of `wanted`, what only that one keeps may be FEW_ULPS of `dtype` above its highest that goes, and what
    only `mine` keeps as far below its lowest that stays. Of d pairs swapped before, the survivors may push as many
    others over the threshold, so that the d-th score from there counts. Returns how many weights came to differ.
    """
    tolerance, found = FEW_ULPS[dtype] * torch.finfo(dtype).eps, 0
    before = torch.zeros_like(wanted[0].kept)
    for number, (one, other) in enumerate(zip(mine, wanted, strict=True), start=1):
        zeros = int((~other.kept).sum())
        assert int((~one.kept).sum()) == zeros, f"mask update {number}: not the {zeros} zeros that are wanted"
        differing = one.kept != other.kept
        new, swapped = differing & ~before, int(before.sum()) // 2
        if new.any():
            ranked = other.scores.sort().values
            goes, stays = ranked[min(zeros - 1 + swapped, len(ranked) - 1)], ranked[max(zeros - swapped, 0)]
            off = torch.where(other.kept, other.scores - goes, stays - other.scores)[new].max()
            distance = float(off / ranked[zeros])
            assert distance <= tolerance, (
                f"mask update {number}: of {int(new.sum())} weights that one keeps and the other does not, one's score "
                f"is {distance:.1e} off the threshold, relative; rounding may make {tolerance:.1e}"
            )
        found, before = found + int(new.sum()), differing
    return found
