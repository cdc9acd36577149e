"""Checkpoints that are whole or not there: written to a temporary folder, synced, marked complete, renamed.

Only then are older ones removed. The newest complete one is what `--resume auto` takes. Files are read with
`weights_only=True`: a checkpoint cannot run code.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from toolkit.dist import World
from toolkit.log import get_logger

__all__ = [
    "CheckpointStore",
    "discard_after",
    "load_checkpoint",
    "newest_checkpoint",
    "random_state",
    "read_identity",
    "restore_random_state",
    "step_of",
]

_STATE, _COMPLETE, _BEST = "state.pt", "COMPLETE", "best.json"


def random_state(device: torch.device) -> dict[str, Any]:
    """torch's generators on this rank. Python's and NumPy's are seeded anew wherever they are used."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(states: list[dict[str, Any]], world: World) -> None:
    """Set this rank's generators; says so where the checkpoint knows fewer ranks."""
    if world.rank >= len(states):
        get_logger().warning("the checkpoint holds no random state for rank %d; dropout starts anew there", world.rank)
        return
    torch.set_rng_state(states[world.rank]["cpu"])
    if world.device.type == "cuda" and "cuda" in states[world.rank]:
        torch.cuda.set_rng_state(states[world.rank]["cuda"], world.device)


def step_of(folder: Path) -> int:
    """Optimizer updates behind a checkpoint folder, by its name."""
    return int(folder.name.removeprefix("step-"))


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((path.parent for path in folder.glob(f"step-*/{_COMPLETE}")), key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def read_identity(path: Path) -> dict[str, Any]:
    """What a checkpoint says it belongs to. Raises ValueError where the folder is not a complete checkpoint."""
    if not (path / _COMPLETE).is_file() or not re.fullmatch(r"step-\d+", path.name):
        raise ValueError(f"--resume {path} is not a complete checkpoint (a step-<number> folder); use --resume auto")
    return json.loads((path / _COMPLETE).read_text())["identity"] or {}


def discard_after(folder: Path, step: int) -> list[str]:
    """Remove checkpoints later than `step`, from which a run that resumes there departs. Returns their names."""
    later = [path for path in _complete(folder) if step_of(path) > step]
    for path in later:
        shutil.rmtree(path)
    return [path.name for path in later]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint folder. Raises ValueError where it is not a complete one."""
    read_identity(path)
    return torch.load(path / _STATE, map_location="cpu", weights_only=True)


class CheckpointStore:
    """The checkpoints/ folder of one run; rank 0 writes."""

    def __init__(self, folder: Path, world: World, history: int) -> None:
        self._folder = folder
        self._world = world
        self._history = max(1, history)

    def save(
        self,
        state: dict[str, Any],
        step: int,
        *,
        identity: dict[str, Any] | None = None,
        metric: float | None = None,
        best: bool = False,
    ) -> None:
        """Write `step-<step>/`; keep the newest `history` and the best. Call on all ranks; rank 0's `state` counts."""
        if self._world.is_main:
            final = self._folder / f"step-{step:08d}"
            temporary = self._folder / f"tmp-{step:08d}"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            torch.save(state, temporary / _STATE)
            facts = {"step": step, "metric": metric, "identity": identity}
            (temporary / _COMPLETE).write_text(json.dumps(facts) + "\n")
            for path in (temporary / _STATE, temporary / _COMPLETE, temporary):
                _sync(path)
            if final.exists():  # out of the way whole: a half-removed folder must not look complete
                final.rename(self._folder / f"tmp-old-{step:08d}")
            temporary.rename(final)
            if best:
                self._write_best(final.name, metric)
            _sync(self._folder)
            self._prune()
        self._world.barrier()

    def _write_best(self, name: str, metric: float | None) -> None:
        temporary = self._folder / (_BEST + ".tmp")
        temporary.write_text(json.dumps({"checkpoint": name, "metric": metric}) + "\n")
        temporary.replace(self._folder / _BEST)

    def _prune(self) -> None:
        best = self._folder / _BEST
        keep = {json.loads(best.read_text())["checkpoint"]} if best.exists() else set()
        for path in _complete(self._folder)[: -self._history]:
            if path.name not in keep:
                shutil.rmtree(path)
        for path in self._folder.glob("tmp-*"):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
