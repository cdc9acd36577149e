"""Every rank of DDP must prune the same weights: an 8-byte digest of its masks, compared at every mask update."""

import hashlib

import torch

from toolkit.engine.run import Run

__all__ = ["MasksDifferError", "check_masks"]


class MasksDifferError(RuntimeError):
    """Ranks have pruned different weights. Raised on all ranks together."""


def _digest(parts: list[bytes]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True) >> 1  # so that its negative is one too


def check_masks(run: Run) -> None:
    """Raise MasksDifferError, naming rank and parameter, where the ranks' masks differ. Call on all ranks.

    With FSDP2 and ZeRO each rank holds the masks of its own share, chosen by one threshold over all of them.
    """
    if run.world.num_ranks == 1 or run.sharding.name != "ddp":
        return
    names = {id(parameter): name for name, parameter in run.prunable}
    masks = {
        names[id(parameter)]: mask.cpu().numpy().tobytes()
        for parameter, mask in run.masked_parameters()
        if id(parameter) in names
    }
    own = _digest(list(masks.values()))
    highest, lowest = run.world.max(torch.tensor([own, -own], dtype=torch.int64, device=run.world.device)).tolist()
    if highest == -lowest:
        return
    every = run.world.gather({name: _digest([mask]) for name, mask in masks.items()})
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
