"""Reads run folders: what a report is made of."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toolkit.builder.resume import FREE_ON_RESUME
from toolkit.engine.history import is_complete

__all__ = ["COMMAND_FILE", "CellRun", "read_runs"]

COMMAND_FILE = "command.txt"  # of launch.matrix, beside the run folders


@dataclass(frozen=True)
class CellRun:
    """One finished run: its folder, metrics.json, memory.json, args.yaml, and the rows of its two CSV files."""

    folder: Path
    metrics: dict[str, Any]
    memory: dict[str, Any]
    arguments: dict[str, Any]
    epochs: list[dict[str, str]]
    timeline: list[dict[str, str]]

    @property
    def optimizer(self) -> str:
        """The optimizer without the pruning in its name: adamw for adamw-movement."""
        return str(self.metrics["opt"]).removesuffix(f"-{self.metrics['pruning']}")

    @property
    def method(self) -> str:
        """The pruning method, by its score where one was chosen; none where nothing is pruned."""
        if self.metrics["pruning"] == "none" or not self.sparsity:
            return "none"
        return str(self.arguments.get("prune_score") or self.metrics["pruning"])

    @property
    def sparsity(self) -> float:
        """Asked for, 0..1."""
        return float(self.metrics["target_sparsity"])

    @property
    def label(self) -> str:
        """Optimizer, pruning method and sparsity: what a reader compares."""
        return self.name + (f" {100 * self.sparsity:g} %" if self.method != "none" else "")

    @property
    def name(self) -> str:
        """The label without the sparsity."""
        plain = self.method == "none" or (self.optimizer in ("adamwprune", "sgdprune") and self.method == "state")
        return self.optimizer if plain else f"{self.optimizer} + {self.method}"

    @property
    def pruning_bytes(self) -> int:
        """What pruning itself keeps at the end: masks, offset tables, scores, first weights."""
        return sum(self.row(name) for name in ("masks", "offsets", "scores", "initial_weights"))

    @property
    def bytes_per_weight(self) -> float:
        """Optimizer state and pruning at the end, per weight of the model."""
        return self.memory["ledger"]["optimizer_bytes"] / (self.row("weights") / 4)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings but the seed and what a resumed run may change: where it writes, how fast it reads."""
        left_out = FREE_ON_RESUME - {"batch_size", "global_batch_size", "grad_accum_steps"} | {"seed"}
        return {key: value for key, value in self.arguments.items() if key not in left_out}

    @property
    def lr(self) -> float:
        """The learning rate the run began with, given or derived."""
        return float(self.metrics.get("lr", self.arguments["lr"]))

    @property
    def schedule_note(self) -> str:
        """The learning-rate and pruning schedule in a few words."""
        a = self.arguments
        pruning = f", mask updates from {a['prune_begin']:g} to {a['prune_end']:g} of all steps"
        return f"{a['sched']}, warm-up {a['warmup_epochs']}{pruning if self.metrics['target_sparsity'] else ''}"

    def phase_steps(self) -> dict[str, int]:
        """The first logged step of each phase after the first, as the timeline has them."""
        begins: dict[str, int] = {}
        for row in self.timeline:
            begins.setdefault(row["phase"], int(row["step"]))
        return dict(list(begins.items())[1:])

    def row(self, name: str) -> int:
        """Bytes of a ledger row at the end of training."""
        return next((row["measured_bytes"] for row in self.memory["ledger"]["rows"] if row["name"] == name), 0)


def read_runs(folder: Path) -> tuple[list[CellRun], list[str]]:
    """(complete runs in the order they were started, names of the incomplete ones). Raises ValueError for none."""
    folders = sorted(path.parent for path in folder.glob("*/args.yaml"))
    done = [path for path in folders if is_complete(path)]
    if not done:
        raise ValueError(f"{folder} holds no complete run; start one with python -m launch.matrix")
    done.sort(key=lambda path: (path / "args.yaml").stat().st_mtime)
    return [_read(path) for path in done], [path.name for path in folders if path not in done]


def _read(folder: Path) -> CellRun:
    def rows(name: str) -> list[dict[str, str]]:
        with open(folder / name, newline="") as file:
            return list(csv.DictReader(file))

    return CellRun(
        folder,
        json.loads((folder / "metrics.json").read_text()),
        json.loads((folder / "memory.json").read_text()),
        yaml.safe_load((folder / "args.yaml").read_text()),
        rows("summary.csv"),
        rows("memory_timeline.csv"),
    )
