"""One finished run as a report sees it, and runs by method: those that differ in the seed only are one row."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.report.significance import mean_and_spread
from toolkit.builder.resume import FREE_ON_RESUME
from toolkit.config import flags

_DEFAULTS = {item.name: item.metadata["default"] for item in flags()}


@dataclass(frozen=True)
class CellRun:
    """One finished run: its folder, metrics.json, memory.json, args.yaml, the rows of its two CSV files, and the
    command that made it, if it is known.
    """

    folder: Path
    metrics: dict[str, Any]
    memory: dict[str, Any]
    arguments: dict[str, Any]
    epochs: list[dict[str, str]]
    timeline: list[dict[str, str]]
    made_by: str = ""

    @property
    def optimizer(self) -> str:
        """The optimizer without the pruning in its name: adamw for adamw-movement."""
        return str(self.metrics["opt"]).removesuffix(f"-{self.metrics['pruning']}")

    @property
    def is_ours(self) -> bool:
        """Whether its optimizer is one of those made for pruning by state."""
        return self.optimizer in ours()

    @property
    def family(self) -> str:
        """SGD or Adam."""
        from toolkit.optim.registry import find_spec

        spec = find_spec(self.optimizer)
        return spec.family if spec else "Adam"

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
        return self.name + (f" {100 * self.sparsity:.4g} %" if self.method != "none" else "")

    @property
    def name(self) -> str:
        """The label without the sparsity."""
        plain = self.method == "none" or (self.is_ours and self.method == "state")
        name = self.optimizer if plain else f"{self.optimizer} + {self.method}"
        return " ".join(filter(None, [name, self.pattern, self.precision]))

    @property
    def pattern(self) -> str:
        """What goes together, empty for single weights and where nothing is pruned."""
        pattern = str(self.arguments.get("prune_pattern", "weight"))
        return "" if pattern == "weight" or self.method == "none" else pattern

    @property
    def precision(self) -> str:
        """What moments and weights were asked to be: a dtype or a budget; empty for moments as float32 weights are."""
        budget, dtype = self.arguments.get("state_budget"), self.arguments.get("state_dtype")
        moments = str(dtype) if dtype else f"budget {budget}" if budget else ""
        return " ".join(filter(None, [moments, "bfloat16 weights" if self.has_bfloat16_weights else ""]))

    @property
    def has_bfloat16_weights(self) -> bool:
        """Whether weights and gradients were kept in bfloat16, as by --model-dtype."""
        return self.arguments.get("model_dtype") == "bfloat16"

    @property
    def pruning_bytes(self) -> int:
        """What pruning itself keeps at the end: masks, offset tables, scores, first weights."""
        return sum(self.row(name) for name in ("masks", "offsets", "scores", "initial_weights"))

    @property
    def bytes_per_weight(self) -> float:
        """Optimizer state and pruning at the end, per weight of the model."""
        return self.memory["ledger"]["optimizer_bytes"] / self.weights

    @property
    def peak_bytes_per_weight(self) -> float:
        """`peak_state_bytes` per weight of the model."""
        return self.peak_state_bytes / self.weights

    @property
    def weights(self) -> float:
        """How many weights the model has; where the run did not count them, by their bytes."""
        by_bytes = self.row("weights") / (2 if self.has_bfloat16_weights else 4)
        return float(self.metrics.get("num_weights", by_bytes))

    @property
    def peak_state_bytes(self) -> int:
        """The most that optimizer and pruning kept at any step that was sampled, or when all tensors took most."""
        sampled = (int(row["optimizer_bytes"]) for row in self.timeline)
        return max(self.memory["ledger_peak"]["optimizer_bytes"], 0, *sampled)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings but the seed and what a resumed run may change: where it writes, how fast it reads.

        Nor the sparsity that N:M says itself, given or not. A setting that came after the run has its default, and 90.0
        is 90: runs of several versions are one study.
        """
        left_out = FREE_ON_RESUME - {"batch_size", "global_batch_size", "grad_accum_steps"} | {"seed"}
        left_out |= {"sparsity"} if ":" in self.pattern else set()
        given = _DEFAULTS | self.arguments
        return {
            key: int(value) if isinstance(value, float) and value.is_integer() else value
            for key, value in given.items()
            if key not in left_out
        }

    @property
    def lr(self) -> float:
        """The learning rate the run began with, given or derived."""
        return float(self.metrics.get("lr", self.arguments["lr"]))

    @property
    def train_s(self) -> float:
        """Seconds of all epochs."""
        return sum(self.metrics["epoch_s"])

    @property
    def schedule_note(self) -> str:
        """The learning-rate and pruning schedule in a few words."""
        a = self.arguments
        pruning = f", mask updates from {a['prune_begin']:g} to {a['prune_end']:g} of all steps"
        pruning += f", {100 * a['prune_start']:g} % zeros from the start" if a.get("prune_start") else ""
        return f"{a['sched']}, warm-up {a['warmup_epochs']}{pruning if self.metrics['target_sparsity'] else ''}"

    @property
    def main_settings(self) -> dict[str, str]:
        """What a reader of a table asks first, by the name of its column."""
        return {
            "lr": f"{self.lr:g}",
            "weight decay": f"{self.arguments['weight_decay']:g}",
            "global batch": str(self.metrics["global_batch_size"]),
            "epochs": str(self.metrics["epochs"]),
            "schedule": self.schedule_note,
            "run": self.folder.name,
        }

    def phase_steps(self) -> dict[str, int]:
        """The first logged step of each phase after the first, as the timeline has them."""
        begins: dict[str, int] = {}
        for row in self.timeline:
            begins.setdefault(row["phase"], int(row["step"]))
        return dict(list(begins.items())[1:])

    def row(self, name: str) -> int:
        """Bytes of a ledger row at the end of training."""
        return next((row["measured_bytes"] for row in self.memory["ledger"]["rows"] if row["name"] == name), 0)


DENSE = ("adamw", "momentum")  # what ours are without pruning, in the order of `ours`


def ours() -> tuple[str, ...]:
    """The optimizers made for pruning by state, Adam's first."""
    from toolkit.optim.registry import specs

    return tuple(spec.name for spec in specs() if spec.is_ours)


Groups = Mapping[str, Sequence[CellRun]]  # label -> runs


def group_by_method(runs: Sequence[CellRun]) -> dict[str, list[CellRun]]:
    """Runs that differ in the seed only. Groups of one label are told apart by the settings in which they differ.

    A setting that most of them share, or among as many the default, is not in a name. Raises ValueError where two runs
    differ in nothing.
    """
    groups: dict[tuple[str, str], dict[int, CellRun]] = {}  # of each the runs by seed
    for run in runs:
        seeds = groups.setdefault((run.label, json.dumps(run.settings, sort_keys=True)), {})
        other = seeds.setdefault(run.metrics["seed"], run)
        if other is not run:
            raise ValueError(
                f"{other.folder} and {run.folder} are the same run (settings and seed); move one elsewhere"
            )
    named = {}
    for (label, _), seeds in groups.items():
        members = list(seeds.values())
        mine = members[0].settings
        rivals = [next(iter(other.values())).settings for (name, _), other in groups.items() if name == label]
        usual = {key: _usual([rival.get(key) for rival in rivals], _DEFAULTS.get(key)) for key in mine}
        unusual = [key for key in sorted(mine) if mine[key] not in usual[key]]
        shown = [f"{key}={'none' if mine[key] in ('', None) else mine[key]}" for key in unusual]
        named[" ".join([label, *shown])] = members
    assert len(named) == len(groups), "two groups of one name"
    return dict(sorted(named.items(), key=lambda item: (_place(item[1][0]), item[0])))


def _place(run: CellRun) -> tuple[bool, str, str, float]:
    """Order of the tables that rank nothing: ours first, then by optimizer, method and sparsity."""
    return not run.is_ours, run.optimizer, "" if run.method == "none" else run.method, run.sparsity


def _usual(values: Sequence[Any], default: Any) -> list[Any]:
    """The value that occurs more often than any other, the default where it is one of several; else none."""
    most = [value for value in values if all(values.count(value) >= values.count(other) for other in values)]
    return most[:1] if most.count(most[0]) == len(most) else [default] if default in most else []


def by_level(groups: Groups) -> dict[float, dict[str, Sequence[CellRun]]]:
    """Sparsity -> groups, dense first."""
    levels = sorted({members[0].sparsity for members in groups.values()})
    return {level: {name: runs for name, runs in groups.items() if runs[0].sparsity == level} for level in levels}


def by_seed(members: Sequence[CellRun]) -> dict[int, float]:
    """seed -> final top-1 in percent."""
    return {run.metrics["seed"]: run.metrics["final_top1"] for run in members}


def top1(members: Sequence[CellRun], which: str = "final") -> tuple[float, float | None]:
    """Mean and spread over the seeds of the final or the best epoch's top-1 in percent."""
    return mean_and_spread([run.metrics[f"{which}_top1"] for run in members])
