"""What a run has done so far, and the files that tell it: summary.csv and metrics.json, each replaced as a whole."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.files import csv_text, read_json, write_atomically, write_json

# timm's columns first, in timm's order.
SUMMARY_COLUMNS = (
    "epoch",
    "train_loss",
    "eval_loss",
    "eval_top1",
    "eval_top5",
    "lr",
    "sparsity",
    "epoch_s",
    "images_per_sec",
    "bad_images",
)


@dataclass
class History:
    """Position and results of a run; goes into checkpoints. Lists have one entry per finished epoch.

    `epoch` and `step` say what comes next; the `_so_far` fields belong to the epoch under way.
    """

    epoch: int = 0
    step: int = 0
    train_loss: list[float] = field(default_factory=list)
    eval_loss: list[float | None] = field(default_factory=list)
    eval_top1: list[float | None] = field(default_factory=list)
    eval_top5: list[float | None] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    epoch_s: list[float] = field(default_factory=list)
    images_per_sec: list[float] = field(default_factory=list)
    bad_images: list[int] = field(default_factory=list)
    best: float | None = None
    loss_sums_so_far: list[float] = field(default_factory=list)  # one per rank
    seconds_so_far: float = 0.0
    train_seconds_so_far: float = 0.0
    bad_so_far: int = 0

    def end_epoch(self, **figures: Any) -> None:
        """Add an epoch's figures, by column, to the lists, and begin the next epoch."""
        for column in SUMMARY_COLUMNS[1:]:
            getattr(self, column).append(figures[column])
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sums_so_far, self.bad_so_far = [], 0
        self.seconds_so_far = self.train_seconds_so_far = 0.0


def is_complete(folder: Path) -> bool:
    """Whether a run folder holds a finished run."""
    try:
        return bool(read_json(folder / "metrics.json")["completed"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_records(folder: Path, history: History, facts: dict[str, Any], *, completed: bool) -> None:
    """Write summary.csv and metrics.json. Rank 0 only. `facts` are the run's fixed entries of metrics.json."""
    rows = [
        {"epoch": epoch, **{key: getattr(history, key)[epoch] for key in SUMMARY_COLUMNS[1:]}}
        for epoch in range(len(history.train_loss))
    ]
    write_atomically(folder / "summary.csv", csv_text(SUMMARY_COLUMNS, rows))
    evaluated = [(top1, epoch) for epoch, top1 in enumerate(history.eval_top1) if top1 is not None]
    rates = history.images_per_sec
    metrics = {
        "train_loss": history.train_loss,
        "eval_loss": history.eval_loss,
        "eval_top1": history.eval_top1,
        "eval_top5": history.eval_top5,
        "sparsity": history.sparsity,
        "epoch_s": history.epoch_s,
        "final_top1": evaluated[-1][0] if evaluated else None,
        "best_top1": max(evaluated)[0] if evaluated else None,
        "best_epoch": max(evaluated, key=lambda pair: (pair[0], -pair[1]))[1] if evaluated else None,
        "final_sparsity": history.sparsity[-1] if history.sparsity else None,
        "target_sparsity": facts["target_sparsity"],
        "images_per_sec": sum(rates) / len(rates) if rates else None,
        "bad_images": sum(history.bad_images),
        **facts,
        "completed": completed,
    }
    write_json(folder / "metrics.json", metrics, indent=1)
