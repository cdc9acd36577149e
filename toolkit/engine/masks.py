"""Masks beside the optimizer: those of all ranks compared at every update, and put on the averaged weights."""

import hashlib

import torch
from torch import Tensor

from toolkit.engine.run import Run
from toolkit.errors import MasksDifferError
from toolkit.prune.mask import flat_view, zero_pruned


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
