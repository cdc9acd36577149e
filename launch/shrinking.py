"""`launch.export --shrink`: a run's model without the channels that are zero throughout, tried on the run's images."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launch.formats import write_format
from launch.run_model import difference, flops, num_weights, run_model, some_images
from toolkit.builder.model import model_arguments
from toolkit.config import Config
from toolkit.markdown import mib
from toolkit.prune.channels import channel_groups
from toolkit.shrink import WEIGHTS, Plan, both_cuts, load_shrunk, remove_dead_channels, save_shrunk

LIMIT = 1e-5  # of the largest output
_IMAGES = 512
_FOR_CONSTANTS = 8


def plan_of(config: Config, plan: Plan, input_size: tuple[int, ...]) -> Plan:
    """A plan with what it must say of a run's model."""
    sides = [] if "img_size" in config.model_kwargs else list(config.sides or ())
    return dataclasses.replace(
        plan,
        model=config.model,
        model_kwargs=model_arguments(config),
        img_size=(sides[0] if sides[0] == sides[1] else sides) if sides else None,
        input_size=tuple(input_size),
        bn_eps=config.bn_eps,
    )


def export_shrunk(checkpoint: Path, weights: dict[str, Tensor], out: Path, kind: str) -> dict[str, Any]:
    """Write the folder `out`; returns what was removed.

    Raises ValueError where the smaller model says otherwise, also read back; then `out` is as it was.
    """
    model, config, before = run_model(checkpoint, weights)
    images, which = some_images(config, model, _IMAGES)
    groups = channel_groups(model, images[:2])
    smaller, plan, dead = remove_dead_channels(model, groups, images[:_FOR_CONSTANTS])
    refused = f"{out} is not written: the smaller model"
    found, apart = _check(model, smaller, images, refused), None
    size = tuple(images.shape[1:])
    plan = dataclasses.replace(plan, layers=both_cuts(before, plan.layers))
    file = out / (WEIGHTS if kind == "safetensors" else f"model.{kind}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent) as beside:
        folder = Path(beside)
        save_shrunk(folder, smaller, plan_of(config, plan, size))
        found = max(found, _check(model, load_shrunk(folder), images, f"{refused}, read back,"))
        if kind != "safetensors":
            apart = write_format(kind, smaller, images[:32], folder / file.name)
        out.mkdir(exist_ok=True)
        for written in folder.iterdir():
            written.replace(out / written.name)
    counts = {group.name: group.count for group in groups}
    return {
        "file": str(file),
        "checkpoint": str(checkpoint),
        "images": which,
        "difference": found,
        "difference_of_format": apart,
        "layers_cut_in_training": len(before),
        "channels": {name: [len(gone), counts[name]] for name, gone in dead.items()},
        "channels_in_groups": sum(counts.values()),
        "weights": [num_weights(model), num_weights(smaller)],
        "flops": [flops(model, size), flops(smaller, size)],
        "dense_bytes": sum(weight.nbytes for weight in weights.values()),
        "stored_bytes": file.stat().st_size,
    }


def export_whole(checkpoint: Path, weights: dict[str, Tensor], out: Path, kind: str) -> dict[str, Any]:
    """Write a run's model, as it is, in another format."""
    model, config, _ = run_model(checkpoint, weights)
    images, which = some_images(config, model, 32)
    return {
        "images": which,
        "difference_of_format": write_format(kind, model, images, out),
        "stored_bytes": out.stat().st_size,
    }


def _check(model: nn.Module, smaller: nn.Module, images: Tensor, what: str) -> float:
    """How far two outputs are apart on any of the images. Raises ValueError above the limit."""
    with torch.no_grad():
        found = max(difference(model(part), smaller(part)) for part in images.split(64))
    if not found <= LIMIT:
        raise ValueError(f"{what} differs by {found:.1e} of the output, more than {LIMIT:g}; export without --shrink")
    return found


def to_text(done: dict[str, Any]) -> str:
    """What was removed, for people."""
    gone, layers = sum(count for count, _ in done["channels"].values()), done["channels"]
    (weights, fewer), (before, after) = done["weights"], done["flops"]
    cut, lines = done["layers_cut_in_training"], []
    if cut:
        lines.append(f"training has cut {cut} layers already (--prune-shrink); below is what else goes")
    lines += [f"{name}: {count} of {every} channels removed" for name, (count, every) in layers.items()]
    apart = done["difference_of_format"]
    lines += [
        f"{gone:,} of {done['channels_in_groups']:,} channels removed, in {len(layers)} layers; "
        f"weights {weights:,} -> {fewer:,}, FLOPs of an image {before:,} -> {after:,} ({after / before:.3f})",
        f"the output differs by {done['difference']:.1e} at most, on {done['images']}"
        + (f"; the file's by {apart:.1e}" if apart is not None else ""),
        f"{done['file']}: {mib(done['stored_bytes'])} MiB, whole {mib(done['dense_bytes'])}; from {done['checkpoint']}",
    ]
    return "\n".join(lines)
