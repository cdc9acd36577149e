"""What a run says about itself: fixed entries of metrics.json, args.yaml, the first log line."""

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from toolkit.builder.data import DataSet, shuffle_window
from toolkit.config import Config
from toolkit.dist import World
from toolkit.engine.run import Plan
from toolkit.files import write_atomically
from toolkit.prune.schedule import Schedule


def run_facts(
    config: Config,
    data: DataSet,
    module: nn.Module,
    opt: str,
    method: str,
    lr: float,
    schedule: Schedule,
    plan: Plan,
    world: World,
) -> dict[str, Any]:
    """Fixed entries of metrics.json, and what a checkpoint must agree on."""
    info = data.info
    return {
        "world_size": world.num_ranks,
        "seed": config.seed,
        "opt": opt,
        "pruning": method,
        "model": config.model,
        # Of ZeRO-3, which empties its weights, as they were.
        "num_weights": sum(getattr(weight, "ds_numel", weight.numel()) for weight in module.parameters()),
        "target_sparsity": schedule.sparsity,
        "dataset": info.get("name", Path(config.data_dir).name),
        "dataset_note": info.get("note", ""),
        "dataset_synthetic": bool(info.get("synthetic", False)),
        "data_fingerprint": data.train.fingerprint,
        "global_batch_size": plan.global_batch_size,
        "num_classes": config.num_classes or data.num_classes,
        "shuffle_window": shuffle_window(config),
        "steps_per_epoch": plan.steps_per_epoch,
        "epochs": plan.epochs,
        "mixed_precision": config.mixed_precision,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else cpu_name(),
        "device_type": world.device.type,
        "threads_per_rank": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "lr": lr,
        "weight_decay": config.weight_decay,
    }


def cpu_name(with_family: bool = False) -> str:
    """The processor and its number of cores, for reports; with its family and model where speed is reported."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = f" family {known['cpu family']} model {known['model']}" if with_family and "cpu family" in known else ""
    return f"{known.get('model name', platform.machine())}{family}, {os.cpu_count()} cores"


def write_args(folder: Path, config: Config) -> None:
    """Write args.yaml: `-c args.yaml` repeats the run, with the batch size that --auto-batch-size found."""
    import yaml

    settings = config.to_dict() | {"auto_batch_size": ""}
    if config.global_batch_size is not None:
        del settings["batch_size"]  # either sets the batch; a recipe may hold one
    write_atomically(folder / "args.yaml", yaml.safe_dump(settings, sort_keys=False))


def describe(facts: dict[str, Any], folder: Path, model: nn.Module, prunable: Iterable[tuple[str, Tensor]]) -> str:
    """The run in one line."""
    every, may_go = (sum(map(_numel, weights)) for weights in (model.parameters(), (weight for _, weight in prunable)))
    ranks = "1 rank" if facts["world_size"] == 1 else f"{facts['world_size']} ranks"
    return (
        f"{facts['model']} ({every:,} parameters, {may_go:,} prunable) "
        f"on {facts['dataset']}{' (SYNTHETIC)' if facts['dataset_synthetic'] else ''}; {facts['opt']}, "
        f"lr {facts['lr']:g}, sparsity {facts['target_sparsity']:g}; {ranks} on {facts['device']}, "
        f"global batch {facts['global_batch_size']}, {facts['epochs']} epochs of {facts['steps_per_epoch']} steps; "
        f"writes to {folder}"
    )


def _numel(weight: Tensor) -> int:
    return int(getattr(weight, "ds_numel", weight.numel()))  # ZeRO-3 leaves empty parameters, their size beside them
