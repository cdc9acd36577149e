"""What a run says about itself: fixed entries of metrics.json, args.yaml, the first log line."""

import os
import platform
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from toolkit.builder.data import DataSet, shuffle_window
from toolkit.config import Config
from toolkit.dist import World
from toolkit.engine.run import Plan
from toolkit.files import write_atomically
from toolkit.prune.schedule import Schedule

__all__ = ["cpu_name", "describe", "run_facts", "write_args"]


def run_facts(
    config: Config, data: DataSet, opt: str, method: str, schedule: Schedule, plan: Plan, world: World
) -> dict[str, Any]:
    """Fixed entries of metrics.json, and what a checkpoint must agree on."""
    info = data.info
    return {
        "world_size": world.num_ranks,
        "seed": config.seed,
        "opt": opt,
        "pruning": method,
        "model": config.model,
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
    }


def cpu_name() -> str:
    """The processor and its number of cores, for reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def write_args(folder: Path, config: Config) -> None:
    """Write args.yaml: `-c args.yaml` repeats the run."""
    import yaml

    settings = config.to_dict()
    if config.global_batch_size is not None:
        del settings["batch_size"]  # either sets the batch; a recipe may hold one
    write_atomically(folder / "args.yaml", yaml.safe_dump(settings, sort_keys=False))


def describe(facts: dict[str, Any], lr: float, folder: Path, model: nn.Module, prunable: set[str]) -> str:
    """The run in one line."""
    # ZeRO-3 leaves empty parameters and their size beside them.
    sizes = {name: getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in model.named_parameters()}
    return (
        f"{facts['model']} ({sum(sizes.values()):,} parameters, {sum(sizes[name] for name in prunable):,} prunable) "
        f"on {facts['dataset']}{' (SYNTHETIC)' if facts['dataset_synthetic'] else ''}; {facts['opt']}, lr {lr:g}, "
        f"sparsity {facts['target_sparsity']:g}; {facts['world_size']} ranks on {facts['device']}, global batch "
        f"{facts['global_batch_size']}, {facts['epochs']} epochs of {facts['steps_per_epoch']} steps; "
        f"writes to {folder}"
    )
