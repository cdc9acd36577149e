"""What `launch.scaling` has every rank do, started by `accelerate launch -m launch.scaling.rank`.

loop: an epoch of our loop, of a bare hand-written one, and of that one without talking between the ranks, in turn.
collectives: count what goes between the ranks. facts: what the formulas need of the model.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from launch.scaling.collectives import count_of_run, traffic_of
from toolkit.builder import build
from toolkit.cli import parse
from toolkit.command import command_parser
from toolkit.dist import leave_group
from toolkit.engine.history import History
from toolkit.engine.loop import train_epoch
from toolkit.engine.metrics import Metrics
from toolkit.engine.run import Run
from toolkit.engine.signals import StopRequest
from toolkit.log import start_logging


def bare_epoch(run: Run, epoch: int) -> None:
    """What one would write by hand with torch alone: model in DDP, optimizer, loss and batches, and nothing else.

    The very objects that our loop trains: with copies of them, where in memory they came to lie made up to 4 %.
    """
    model, optimizer, to_inputs, loss = run.engine.model, run.engine.inner_optimizer, run.to_inputs, run.train_loss
    model.train()
    for batch in run.train_loader.epoch(epoch):
        images, targets = to_inputs(batch)
        optimizer.zero_grad()
        loss(model(images), targets).backward()
        optimizer.step()


def bare_epoch_alone(run: Run, epoch: int) -> None:
    """The same with no rank hearing of the others."""
    assert isinstance(run.engine.model, DistributedDataParallel)
    with run.engine.model.no_sync():
        bare_epoch(run, epoch)


def measure_loops(run: Run, rounds: int) -> dict[str, Any]:
    """Seconds of an epoch of each loop, interleaved; the first round is not counted. Call on all ranks."""
    metrics = Metrics(run)
    passes: dict[str, Callable[[int], Any]] = {
        "ours": lambda number: train_epoch(run, History(epoch=number), StopRequest(), metrics),
        "bare": partial(bare_epoch, run),
    }
    if run.world.num_ranks > 1:
        passes["alone"] = partial(bare_epoch_alone, run)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    order = list(passes)
    for number in range(rounds + 1):
        for name in order:
            run.world.barrier()
            begin = time.perf_counter()
            passes[name](number)
            if run.world.device.type == "cuda":
                torch.cuda.synchronize()
            took = torch.tensor(time.perf_counter() - begin, device=run.world.device)
            seconds[name].append(run.world.max(took).item())
        order = order[1:] + order[:1]
    run.memory.close()
    seconds = {name: taken[1:] for name, taken in seconds.items()}

    def ratios(name: str) -> list[float]:
        return [taken / bare for taken, bare in zip(seconds[name], seconds["bare"], strict=True)]

    return {
        "ranks": run.world.num_ranks,
        "steps": run.plan.steps_per_epoch,
        "rounds": rounds,
        "epoch_s": seconds,
        "overhead": statistics.median(ratios("ours")) - 1,
        "overhead_rounds": [ratio - 1 for ratio in ratios("ours")],
        "communication_share": 1 - statistics.median(ratios("alone")) if "alone" in seconds else None,
    }


def main(argv: list[str] | None = None) -> int:
    """Build the run of the train flags, measure, and write the result on rank 0."""
    parser = command_parser(
        "launch.scaling.rank",
        __doc__,
        {
            "what": {"choices": ("loop", "collectives", "facts")},
            "result": {"type": Path},
            "--rounds": {"type": int, "default": 9},
        },
    )
    options, flags = parser.parse_known_args(argv)
    if options.what == "loop":
        flags += ["--epochs", str(options.rounds + 1)]
    start_logging(int(os.environ.get("RANK", "0")))
    run = build(parse([flag for flag in flags if flag != "--"]))
    if options.what == "loop":
        result = measure_loops(run, options.rounds)
    elif options.what == "collectives":
        result = {"engine": run.engine.name, "ranks": run.world.num_ranks, "counted": count_of_run(run)}
    else:
        result = vars(traffic_of(run))
    if run.world.is_main:
        options.result.write_text(json.dumps(result))
    del run
    leave_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
