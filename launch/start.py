"""How launch starts programs: from the repository's root, with this environment's Python, alone or on several ranks."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def accelerate_launch(config_file: str | Path, *program: str, ranks: int | None = None) -> list[str]:
    """A program under `accelerate launch`; `ranks` overrides the number in the launch file."""
    return [
        "accelerate",
        "launch",
        "--config_file",
        str(config_file),
        *([] if ranks is None else ["--num_processes", str(ranks)]),
        *program,
    ]


_MODULES = {
    "python": [],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
    "torchrun": ["-m", "torch.distributed.run"],
}


def installed(command: Sequence[str]) -> list[str]:
    """The command with its program from this Python, whatever PATH says and wherever scripts were installed."""
    return [sys.executable, *_MODULES[command[0]], *command[1:]]


def environment(**more: str) -> dict[str, str]:
    """This process's, with the repository importable from any folder, and `more`."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}
