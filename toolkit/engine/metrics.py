"""What a run tells while it goes on: figures reduced over the ranks, log lines, and scalars for its trackers.

Every scalar's name stands here, in one place. Rank 0 writes them; TensorBoard's lie in the run folder's tb/.
"""

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolkit.dist import World
from toolkit.engine.history import History
from toolkit.engine.run import Run
from toolkit.engine.step import StepResult
from toolkit.log import get_logger
from toolkit.markdown import MIB
from toolkit.memory.allocator import read_device, read_host
from toolkit.progress import duration

_SLOW_DATA_PERCENT = 20  # of the time spent waiting for data, above which the log says what to change
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
                figures = (min(values) / MIB, sum(values) / len(values) / MIB, values.index(max(values)))
                scalars |= zip([name + suffix for suffix in _OVER_RANKS], figures, strict=True)
    return scalars


class Metrics:
    """What happened since the last log line, and the line and scalars made of it. On ranks but 0 nothing is written."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._advised = False
        self._trackers = run.start_trackers() if run.world.is_main else []
        self._tensorboard = next((one.tracker for one in self._trackers if one.name == "tensorboard"), None)
        if self._tensorboard is not None:
            self._tensorboard.add_custom_scalars(_LAYOUT)
        self.begin_window()

    def begin_window(self) -> None:
        """Time and count from here; the loop puts each step's result into `results`."""
        self._begin = time.perf_counter()
        self.results: list[StepResult] = []

    def report(self, update: int, history: History) -> int:
        """A log line and the scalars of the window, which ends. Returns the epoch's unreadable images on all ranks.

        Call on all ranks: one vector is summed over them.
        """
        scalars, bad = self._reduce(update, history)
        self.write(scalars, update)
        self._log(scalars, update, history)
        self.begin_window()
        return bad

    def _reduce(self, update: int, history: History) -> tuple[dict[str, Any], int]:
        run, plan, results = self._run, self._run.plan, self.results
        elapsed = time.perf_counter() - self._begin
        loss = torch.stack([result.loss for result in results]).double().mean()
        device = read_device(run.world.device)  # before the sample, whose record begins new peaks
        ledger = run.memory.sample(update)
        rest = [sum(result.wait_s for result in results) / elapsed, history.bad_so_far]
        columns = memory_columns(run.world, {"ledger": sum(ledger.values()), **device}).to(loss.device)
        own = (loss[None], torch.tensor(rest, dtype=torch.float64, device=loss.device), columns.flatten())
        sums = run.world.sum(torch.cat(own))
        total_loss, total_wait, bad = sums[:3].tolist()
        zeros, weights = run.sparsity()
        grad_norm = results[-1].grad_norm
        return {
            "train/loss": total_loss / run.world.num_ranks,
            "train/lr": run.learning_rate,
            "train/images_per_sec": len(results) * plan.global_batch_size / elapsed,
            "train/grad_norm": None if grad_norm is None else float(grad_norm),
            "train/data_wait(%)": 100 * total_wait / run.world.num_ranks,
            "train/epoch": update / plan.steps_per_epoch,
            "train/bad_images": bad,
            "pruning/sparsity": zeros / max(weights, 1),
            "pruning/target_sparsity": run.target_sparsity,
            **memory_scalars(sums[3:].view_as(columns), on_gpu=run.world.device.type == "cuda"),
            "memory/num_alloc_retries": device["alloc_retries"],
            "memory/num_ooms": device["ooms"],
            "memory/rss(MiB)": read_host()["rss_bytes"] / MIB,
            **{f"memory/ledger/{row}(MiB)": size / MIB for row, size in ledger.items()},
        }, int(bad)

    def _log(self, scalars: Mapping[str, Any], update: int, history: History) -> None:
        run, plan = self._run, self._run.plan
        rate, wait = scalars["train/images_per_sec"], scalars["train/data_wait(%)"]
        step_s = plan.global_batch_size / rate
        get_logger().info(
            "Train: %d [%4d/%d (%3.0f%%)]  Loss: %.4g  Time: %.3fs, %7.2f/s  LR: %.3e  Data: %.0f %%%s  Left: %s",
            history.epoch,
            history.step,
            plan.steps_per_epoch,
            100 * history.step / plan.steps_per_epoch,
            scalars["train/loss"],
            step_s,
            rate,
            scalars["train/lr"],
            wait,
            f"  Sparsity: {100 * scalars['pruning/sparsity']:.2f} %" if run.goal.enabled else "",
            duration((plan.total_steps - update) * step_s),
        )
        if wait > _SLOW_DATA_PERCENT and not self._advised:
            self._advised = True
            get_logger().info(
                "training waits %.0f %% of its time for data: raise --workers (now %d a rank; this host has %d cores), "
                "leave out --color-jitter and --aa, or make smaller images (python -m shards.imagenet --max-short)",
                wait,
                run.train_loader.workers,
                os.cpu_count() or 1,
            )

    def write(self, values: Mapping[str, float | None], step: int) -> None:
        """Write the values that are not None. A name outside SCALARS is a mistake in the code."""
        for name in values:
            assert name in SCALARS or name.startswith("memory/ledger/"), name
        known = {name: float(value) for name, value in values.items() if value is not None}
        for tracker in self._trackers:
            tracker.log(known, step=step)

    def write_settings(self, settings: Mapping[str, object]) -> None:
        """One row of TensorBoard's hparams tab: these settings, and the last eval/top1, eval/loss and sparsity."""
        if self._tensorboard is not None:
            from torch.utils.tensorboard.summary import hparams

            plain = {key: value for key, value in settings.items() if isinstance(value, (bool, int, float, str))}
            for summary in hparams(plain, dict.fromkeys(_RESULTS, 0.0)):  # the tab reads the scalars themselves
                self._tensorboard.file_writer.add_summary(summary)

    def close(self) -> None:
        """Let the trackers write what they still hold."""
        for tracker in self._trackers:
            tracker.finish()
