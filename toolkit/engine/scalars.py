"""TensorBoard: every scalar's name in one place, written by rank 0 into the run folder's tb/."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.dist import World
from toolkit.markdown import MIB

__all__ = ["MIB", "NUM_MEMORY_COLUMNS", "SCALARS", "Scalars", "memory_columns", "memory_scalars"]

# Scalars over all ranks, and the reading each is made of. The tag without a suffix is the highest of the ranks.
_MEMORY = {
    "memory/ledger_total(MiB)": "ledger",
    "memory/max_allocated(MiB)": "allocated_peak_bytes",
    "memory/max_active(MiB)": "active_peak_bytes",
    "memory/max_reserved(MiB)": "reserved_peak_bytes",
    "memory/device_used(MiB)": "device_used_bytes",
}
NUM_MEMORY_COLUMNS = len(_MEMORY)  # figures of every rank in the all-reduce of a log line
_OVER_RANKS = ("_min(MiB)", "_mean(MiB)", "_argmax_rank")
_RESULTS = ("eval/top1", "eval/loss", "pruning/sparsity")
_LAYOUT = {  # TensorBoard's custom scalars
    "accuracy": {"top-1 and top-5": ["Multiline", ["eval/top1", "eval/top5"]]},
    "pruning": {"sparsity": ["Multiline", ["pruning/sparsity", "pruning/target_sparsity"]]},
    "memory": {"by owner": ["Multiline", ["memory/ledger/.*"]]},
}
# The step of every scalar is the number of optimizer updates. memory/ledger/<row>(MiB) comes on top.
SCALARS = frozenset(
    {
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/images_per_sec",
        "train/data_wait(%)",
        "train/epoch",
        "train/bad_images",
        "eval/loss",
        "eval/top1",
        "eval/top5",
        "pruning/sparsity",
        "pruning/target_sparsity",
        "memory/rss(MiB)",
        "memory/num_alloc_retries",
        "memory/num_ooms",
        *_MEMORY,
        *(tag.removesuffix("(MiB)") + suffix for tag in _MEMORY for suffix in _OVER_RANKS),
    }
)


def memory_columns(world: World, reading: Mapping[str, int | None]) -> Tensor:
    """float64 [ranks, figures] in bytes with this rank's row filled in: the sum over the ranks holds everyone's."""
    columns = torch.zeros(world.num_ranks, len(_MEMORY), dtype=torch.float64)
    columns[world.rank] = torch.tensor([float(reading[key] or 0) for key in _MEMORY.values()])
    return columns


def memory_scalars(columns: Tensor, *, on_gpu: bool) -> dict[str, float | None]:
    """Scalars of the ranks' readings; without a GPU only the ledger's, and with one rank only the highest."""
    scalars: dict[str, float | None] = {}
    for tag, values in zip(_MEMORY, columns.t().tolist(), strict=True):
        if on_gpu or _MEMORY[tag] == "ledger":
            name = tag.removesuffix("(MiB)")
            scalars[tag] = max(values) / MIB
            if len(values) > 1:
                scalars[f"{name}_min(MiB)"] = min(values) / MIB
                scalars[f"{name}_mean(MiB)"] = sum(values) / len(values) / MIB
                scalars[f"{name}_argmax_rank"] = values.index(max(values))
    return scalars


class Scalars:
    """Writes scalars on rank 0 and does nothing on the others."""

    def __init__(self, folder: Path, world: World, first_step: int = 0) -> None:
        self._writer: Any = None
        if world.is_main:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run goes over the steps after its checkpoint again; their first version is dropped.
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)
            self._writer.add_custom_scalars(_LAYOUT)

    def write(self, values: Mapping[str, float | None], step: int) -> None:
        """Write the values that are not None. A name outside SCALARS is a mistake in the code."""
        if self._writer is None:
            return
        for name, value in values.items():
            assert name in SCALARS or name.startswith("memory/ledger/"), name
            if value is not None:
                self._writer.add_scalar(name, float(value), step)
        self._writer.flush()

    def write_settings(self, settings: Mapping[str, object]) -> None:
        """One row of TensorBoard's hparams tab: these settings, and the last eval/top1, eval/loss and sparsity."""
        if self._writer is not None:
            from torch.utils.tensorboard.summary import hparams

            plain = {key: value for key, value in settings.items() if isinstance(value, (bool, int, float, str))}
            for summary in hparams(plain, dict.fromkeys(_RESULTS, 0.0)):  # the tab reads the scalars themselves
                self._writer.file_writer.add_summary(summary)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
