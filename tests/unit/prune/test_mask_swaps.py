"""What tells a swap at the threshold from a wrong mask, which tests on a GPU need, on swaps of a known size."""

import pytest
import torch
from masks import FEW_ULPS, MaskUpdate, check_masks, watch_mask_updates
from packed import KINDS, PRUNING, parameters, run, total, zeros

from toolkit.kernels.compiled import available
from toolkit.optim.adamwprune import AdamWPrune

SCORES = 1.0 + torch.randperm(1000, generator=torch.Generator().manual_seed(0)).double() / 100  # 0.01 apart
ORDER = SCORES.argsort()
ZEROS = 700


def updated(scores, zeros=ZEROS, swap=None):
    """A mask update that prunes the lowest, but for a swap of the weights at two ranks."""
    kept = torch.ones(len(scores), dtype=torch.bool)
    kept[scores.argsort()[:zeros]] = False
    if swap is not None:
        kept[scores.argsort()[list(swap)]] ^= True
    return MaskUpdate(scores, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [ZEROS, ZEROS + 3])
def test_a_swap_at_the_threshold_is_roundings_and_one_a_little_beside_it_is_not(dtype, rank):
    """The highest that goes is swapped with one that stays, a number of ulps above it."""
    for ulps, fine in ((0, True), (FEW_ULPS[dtype] - 0.5, True), (FEW_ULPS[dtype] + 0.5, False)):
        scores = SCORES.clone()
        scores[ORDER[ZEROS : rank + 1]] = SCORES[ORDER[ZEROS - 1]] / (1 - ulps * torch.finfo(dtype).eps)
        wanted, mine = (MaskUpdate(scores, updated(SCORES, swap=swap).kept) for swap in (None, (ZEROS - 1, rank)))
        if fine:
            assert check_masks([mine], [wanted], dtype) == 2
        else:
            with pytest.raises(AssertionError, match="off the threshold"):
                check_masks([mine], [wanted], dtype)


@pytest.mark.parametrize("swap", [(ZEROS - 1, ZEROS), (0, ZEROS), (ZEROS - 1, 999), (10, 990)])
def test_a_swap_far_from_the_threshold_is_wrong(swap):
    assert check_masks([updated(SCORES)], [updated(SCORES)]) == 0
    with pytest.raises(AssertionError, match="off the threshold"):
        check_masks([updated(SCORES, swap=swap)], [updated(SCORES)])


def test_a_revived_weight_other_zeros_and_a_missing_update_are_wrong():
    dead = SCORES.clone()
    dead[ORDER[:300]] = -torch.inf  # pruned before
    with pytest.raises(AssertionError, match="inf off the threshold"):
        check_masks([updated(dead, swap=(5, ZEROS))], [updated(dead)])
    with pytest.raises(AssertionError, match="700 zeros"):
        check_masks([updated(SCORES, ZEROS + 1)], [updated(SCORES)])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        check_masks([], [updated(SCORES)])


def after_a_swap(taken):
    """Two updates of ten weights. First X = 3 and Y = 4 score the same, and `mine` keeps X where Y is wanted.

    Then X is worth much, where it lives, and Y little: Y goes, and of `mine` another in its place.
    """
    first, second = torch.arange(1.0, 11), torch.arange(1.0, 11)
    first[3] = first[4]
    second[:4] = -torch.inf
    mine, wanted = [], []
    for scores, gone, wanted_gone in ((first, (0, 1, 2, 4), (0, 1, 2, 3)), (second, (0, 1, 2, 4, 5, taken), range(6))):
        for updates, indices in ((mine, gone), (wanted, wanted_gone)):
            updates.append(
                MaskUpdate(scores, torch.ones(10, dtype=torch.bool).index_fill(0, torch.tensor(indices), False))
            )
    return mine, wanted


def test_an_earlier_swap_moves_the_threshold_by_one_score_and_no_further():
    assert check_masks(*after_a_swap(taken=6)) == 3
    with pytest.raises(AssertionError, match="mask update 2"):
        check_masks(*after_a_swap(taken=7))
    mine, wanted = after_a_swap(taken=6)
    with pytest.raises(AssertionError, match="mask update 1"):
        check_masks(mine[1:], wanted[1:])


@pytest.mark.skipif(not available(), reason="no C++ compiler here")
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_native_code_keeps_what_the_reference_keeps(kind, options):
    watched = []
    for how in ("native", "reference"):
        weights = parameters()
        optimizer = kind(weights, implementation=how, **options, **PRUNING)
        watched.append(watch_mask_updates(optimizer))
        run(optimizer, weights, 21)
    assert [int((~update.kept).sum()) for update in watched[0]][-1] == zeros(weights) == int(0.8 * total(weights))
    assert len(watched[0]) == 7
    check_masks(*watched)


def test_another_score_is_no_rounding():
    watched = []
    for score in ("magnitude", "variance"):
        weights = parameters()
        optimizer = AdamWPrune(weights, lr=1e-2, score=score, **PRUNING)
        watched.append(watch_mask_updates(optimizer))
        run(optimizer, weights, 21)
    with pytest.raises(AssertionError, match="off the threshold"):
        check_masks(*watched)
