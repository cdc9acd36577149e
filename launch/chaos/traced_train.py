"""train.py's work under watch: what `launch.chaos` has the launcher start in its place.

Trains the same way and also writes the part it is in (step, mask update, evaluation, checkpoint) to
`$VICTIM_PARTS.<rank>`, from which `launch.chaos.kills` reads when to strike.
"""

import functools
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.start import ROOT


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
    from toolkit.engine import loop
    from toolkit.prune.pruning import Pruning

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
        (Pruning, "update", "mask update"),
        (loop, "evaluate", "evaluation"),
        (loop, "save_snapshot", "checkpoint"),
    ):
        _announce(owner, name, part, write)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
