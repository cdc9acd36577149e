"""`python -m launch.estimate FILE`: time and memory of a matrix ahead of it.

Of every kind of cell (all but the seed alike) a few steps of the real run are timed in this process, on one rank, and
its memory is predicted. Nothing is written but a temporary folder. Steps are timed one after the other with all cores;
with --jobs each cell has its share of them, which on CPU comes out much the same in all.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from launch.matrix.cells import SELECTION, Cell, selected
from toolkit.command import command_parser, one_line_errors
from toolkit.markdown import mib
from toolkit.progress import duration, tracked

_WARM_UP, _TIMED = 2, 5


def _probe(cell: Cell) -> dict[str, Any]:
    """Seconds of a step (median) and of evaluating an image, step and image counts, predicted bytes at the peak."""
    import torch

    from toolkit.builder import build
    from toolkit.cli import parse
    from toolkit.engine.evaluate import evaluate
    from toolkit.engine.step import train_step

    with tempfile.TemporaryDirectory() as folder:
        run = build(parse([*cell.arguments, "--output", folder, "--experiment", "estimate"]))
        batches, taken, plan = run.train_loader.epoch(0), [], run.plan
        begin = run.schedule.begin_step if run.schedule.enabled else 0
        for number in range(1, min(_WARM_UP + _TIMED, plan.steps_per_epoch) + 1):
            start = time.perf_counter()
            train_step(run, batches, min(number, max(begin, 1)), 0, stop=False, want_grad_norm=False)
            if run.world.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        start = time.perf_counter()
        images = evaluate(run, run.engine.module).num_samples
        evaluation_s = time.perf_counter() - start
        evaluations = len({*range(plan.val_interval, plan.epochs + 1, plan.val_interval), plan.epochs})
        step_s = statistics.median(taken[min(_WARM_UP, len(taken) - 1) :])
        _, peaks = run.predict_memory(run.world.rank)
        run.memory.close()
        run.lock.close()
    return {
        "step_s": step_s,
        "steps": plan.total_steps,
        "evaluation_s": evaluation_s,
        "evaluations": evaluations,
        "evaluated_images": images,
        "run_s": step_s * plan.total_steps + evaluation_s * evaluations,
        "predicted_peak_bytes": {name: sum(rows.values()) for name, rows in peaks.items()},
    }


def estimate(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One entry a kind of cell: its runs, and what one of them takes."""
    kinds: dict[str, list[Cell]] = {}
    for cell in cells:
        kinds.setdefault(cell.name.rpartition("_seed")[0], []).append(cell)
    return [
        {"kind": name, "runs": len(kinds[name]), **_probe(kinds[name][0])}
        for name in tracked(list(kinds), "kinds", "estimate")
    ]


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, probe, print a table."""
    parser = command_parser(
        "launch.estimate",
        __doc__,
        {
            **SELECTION,
            "--json": {"action": "store_true", "help": "one JSON object on one line on stdout"},
        },
    )
    options = parser.parse_args(argv)
    with one_line_errors(parser):
        found = estimate(selected(options)[1])
    total_s = sum(row["run_s"] * row["runs"] for row in found)
    if options.json:
        print(json.dumps({"schema": "estimate/1", "kinds": found, "total_s": total_s}))  # noqa: T201
        return 0
    width = max(len(row["kind"]) for row in found)
    lines = [f"{'run':<{width}}  runs  step (ms)   a run  peak, dense (MiB)  peak, pruned (MiB)"]
    for row in found:
        dense, pruned = (mib(row["predicted_peak_bytes"].get(name), 0) for name in ("dense", "final"))
        lines.append(
            f"{row['kind']:<{width}}  {row['runs']:>4}  {1e3 * row['step_s']:>9.1f}  {duration(row['run_s']):>6}  "
            f"{dense:>17}  {pruned:>18}"
        )
    lines.append(f"in all about {duration(total_s)} one after the other, start-up (some 5 s a run) not counted")
    print("\n".join(lines))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
