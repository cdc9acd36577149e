"""TensorBoard: every scalar's name in one place, written by rank 0 into the run folder's tb/."""

from collections.abc import Mapping
from pathlib import Path

from toolkit.dist import World

__all__ = ["MIB", "SCALARS", "Scalars"]

MIB = 2**20
# The step of every scalar is the number of optimizer updates. memory/ledger/<row>(MiB) comes on top.
SCALARS = frozenset(
    {
        "train/loss", "train/lr", "train/grad_norm", "train/images_per_sec", "train/data_wait(%)", "train/epoch",
        "train/bad_images", "eval/loss", "eval/top1", "eval/top5", "pruning/sparsity", "pruning/target_sparsity",
        "memory/max_allocated(MiB)", "memory/max_reserved(MiB)", "memory/device_used(MiB)", "memory/rss(MiB)",
    }
)  # fmt: skip


class Scalars:
    """Writes scalars on rank 0 and does nothing on the others."""

    def __init__(self, folder: Path, world: World, first_step: int = 0) -> None:
        self._writer = None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run goes over the steps after its checkpoint again; their first version is dropped.
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def write(self, values: Mapping[str, float | None], step: int) -> None:
        """Write the values that are not None. A name outside SCALARS is a mistake in the code."""
        if self._writer is None:
            return
        for name, value in values.items():
            assert name in SCALARS or name.startswith("memory/ledger/"), name
            if value is not None:
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
