"""train.py's work under watch: what `launch.chaos` has the launcher start in its place.

Trains the same way and also writes the part it is in (step, mask update, evaluation, checkpoint) to
`$VICTIM_PARTS.<rank>`, from which `launch.chaos.kills` reads when to strike.
"""

import contextlib
import os
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.start import ROOT


def main() -> None:
    """Run train.py, saying at each moment what it does; ends with its exit status."""
    from toolkit.engine import loop
    from toolkit.prune.pruning import Pruning

    parts = Path(os.environ["VICTIM_PARTS"])
    file = os.open(parts.with_name(f"{parts.name}.{os.environ['RANK']}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    stack = ["loading"]

    def write() -> None:
        os.ftruncate(file, 0)
        os.pwrite(file, stack[-1].encode(), 0)

    @contextlib.contextmanager
    def inside(part: str) -> Iterator[None]:
        stack.append(part)
        write()
        try:
            yield
        finally:
            stack.pop()
            write()

    watched: tuple[tuple[Any, str, str], ...] = (
        (loop, "train_step", "step"),
        (Pruning, "update", "mask update"),
        (loop, "evaluate", "evaluation"),
        (loop, "save_snapshot", "checkpoint"),
    )
    for owner, name, part in watched:
        setattr(owner, name, inside(part)(getattr(owner, name)))
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
