"""A real run to be disturbed: its command, and what it was doing when the blow fell.

Started by the launcher in place of train.py, this file trains the same way and also writes the part it is in (step,
mask update, evaluation, checkpoint) to `$VICTIM_PARTS.<rank>`, from which `launch.chaos.kills` reads when to strike.
"""

import functools
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint

__all__ = ["PARTS", "final_state", "launch_command", "part_of", "quiet_environment", "ranks_of"]

ROOT = Path(__file__).parents[2]
PARTS = ("loading", "step", "mask update", "evaluation", "checkpoint")


def launch_command(data: Path, out: Path, name: str, *more: str, restarts: int = 0) -> list[str]:
    """The run under `accelerate launch` on two CPU ranks, 20 s long; `more` flags of train.py override its own."""
    return [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--config_file",
        str(ROOT / "accelerate_configs" / "cpu.yaml"),
        "--max_restarts",
        str(restarts),
        "--monitor_interval",
        "1",
        "-m",
        "launch.chaos.traced_train",
        "--data-dir",
        str(data),
        "--model",
        "test_resnet",
        "--img-size",
        "32",
        "--global-batch-size",
        "64",
        "--epochs",
        "4",
        "--lr",
        "3e-3",
        "--warmup-epochs",
        "0",
        "--sched-on-updates",
        "--color-jitter",
        "0",
        "-j",
        "1",
        "--opt",
        "adamwprune",
        "--sparsity",
        "0.7",
        "--prune-frequency",
        "3",
        "--checkpoint-interval",
        "5",
        "--dist-timeout",
        "120",
        "--log-interval",
        "5",
        "--output",
        str(out),
        "--experiment",
        name,
        "--resume",
        "auto",
        *more,
    ]


def quiet_environment(parts: Path) -> dict[str, str]:
    """One thread a rank, gloo on the loopback, and where the parts go."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VICTIM_PARTS": str(parts),
        "PYTHONPATH": str(ROOT),
    }


def ranks_of(launcher: int) -> dict[int, int]:
    """rank -> process number of the training processes below a launcher."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == launcher:
                facts = dict(part.split("=", 1) for part in (entry / "environ").read_text().split("\0") if "=" in part)
                if "RANK" in facts:
                    found[int(facts["RANK"])] = int(entry.name)
        except (OSError, ValueError, IndexError):
            continue
    return found


def part_of(parts: Path, rank: int) -> str:
    """What a rank was doing last; loading where it has not said."""
    try:
        return parts.with_name(f"{parts.name}.{rank}").read_text() or "loading"
    except FileNotFoundError:
        return "loading"


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, buffers, moments and masks of the newest checkpoint, on CPU."""
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None, f"{folder} has no checkpoint"
    state = load_checkpoint(newest)
    return {
        **state["model"],
        **{f"{name}.{key}": value for name, kept in state["optimizer"]["state"].items() for key, value in kept.items()},
    }


def _announce(owner: Any, name: str, part: str, write: Callable[[str], str]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def announced(*arguments: Any, **more: Any) -> Any:
        before = write(part)
        try:
            return original(*arguments, **more)
        finally:
            write(before)

    setattr(owner, name, announced)


def main() -> None:
    """Run train.py, saying at each moment what it does; ends with its exit status."""
    from toolkit.optim.mask_update import MaskUpdate

    from toolkit.engine import loop

    parts = Path(os.environ["VICTIM_PARTS"])
    file = os.open(parts.with_name(f"{parts.name}.{os.environ['RANK']}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    now = "loading"

    def write(part: str) -> str:
        nonlocal now
        before, now = now, part
        os.ftruncate(file, 0)
        os.pwrite(file, part.encode(), 0)
        return before

    for owner, name, part in (
        (loop, "train_step", "step"),
        (MaskUpdate, "run", "mask update"),
        (loop, "evaluate", "evaluation"),
        (loop, "save_snapshot", "checkpoint"),
    ):
        _announce(owner, name, part, write)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
