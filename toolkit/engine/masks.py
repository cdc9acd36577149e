"""Masks beside the optimizer: those of all ranks compared at every update, and put on the averaged weights."""

import hashlib

import torch
from torch import Tensor

from toolkit.engine.run import Run
from toolkit.errors import MasksDifferError
from toolkit.log import get_logger
from toolkit.prune.mask import flat_view, zero_pruned

_MOVING_FROM = 10  # steps: before, blocks whose last BatchNorm begins at 0 have no gradient
_WORTH_TELLING = 0.01  # of the prunable weights


def _digest(content: bytes) -> int:
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) >> 1  # 63 bits: the comparison negates it


def check_masks(run: Run) -> None:
    """Raise MasksDifferError, naming rank and parameter, where the ranks' masks differ. Call on all ranks.

    Every rank of DDP must prune the same weights; 8 bytes say whether it did. With FSDP2 and ZeRO each rank holds the
    masks of its own share, chosen by one threshold over all of them.
    """
    if run.world.num_ranks == 1 or run.engine.name != "ddp":
        return
    names = {id(parameter): name for name, parameter in run.prunable}
    digests = {
        names[id(parameter)]: _digest(mask.cpu().numpy().tobytes())
        for parameter, mask in run.masked_parameters()
        if id(parameter) in names
    }
    own = _digest(repr(digests).encode())
    highest, lowest = run.world.max(torch.tensor([own, -own], dtype=torch.int64, device=run.world.device)).tolist()
    if highest == -lowest:
        return
    every = run.world.gather(digests)
    for name in sorted({name for one in every for name in one}):
        found = [one.get(name) for one in every]
        usual = max(set(found), key=found.count)
        odd = [rank for rank, digest in enumerate(found) if digest != usual]
        if odd:
            raise MasksDifferError(
                f"rank {odd[0]} has another mask of {name} than most ranks (of {len(every)}); its memory or arithmetic "
                "differs. The last checkpoint is from before"
            )
    raise AssertionError("digests differ, masks do not")


def tell_of_idle_weights(run: Run, step: int) -> None:
    """Warn, once before the first of them goes, of prunable weights whose gradient is exactly 0. Call on all ranks.

    At 32 pixels a ResNet's last kernels meet little but padding, and half of its weights never learn: a sparsity that
    takes those first is in part for free. ZeRO keeps no gradients to look at, and --fused-backward none.
    """
    if not run.schedule.enabled or step != max(run.schedule.begin_step, _MOVING_FROM) or run.target_sparsity:
        return
    gradients = [(name, weight.grad) for name, weight in run.prunable if weight.grad is not None]
    if run.engine.name not in ("ddp", "fsdp2") or len(gradients) < len(run.prunable) or run.sparsity()[0]:
        return
    idle, weights = run.engine.count_zeros(gradients)
    if idle >= _WORTH_TELLING * weights:
        taken = max(0.0, 1 - (1 - run.schedule.sparsity) * weights / max(weights - idle, 1))
        get_logger().warning(
            "%s of %s prunable weights (%.1f %%) have a gradient of exactly 0 at step %d, as kernels have that meet "
            "only padding; a sparsity of %s takes %.1f %% of the others. Larger images may put them to use",
            f"{idle:,}",
            f"{weights:,}",
            100 * idle / weights,
            step,
            run.schedule.sparsity,
            100 * taken,
        )


class AverageMasks:
    """Puts new masks on the averaged weights.

    Once a pruned weight's average is 0 it stays 0, for the weight is; so a mask is applied when it is new, and the
    average does not depend on when it is evaluated or saved.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._applied: dict[int, Tensor] = {}
        if run.ema is not None:
            self._averages = {id(shown): average for shown, average in run.engine.averages(run.ema.module)}

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the averages of the weights that were pruned since the last call."""
        for parameter, mask in self._run.masked_parameters():
            if self._applied.get(id(parameter)) is not mask:
                zero_pruned(flat_view(self._averages[id(parameter)]), mask)
                self._applied[id(parameter)] = mask
