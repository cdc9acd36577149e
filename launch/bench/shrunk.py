"""`python -m launch.bench shrunk`: a training step of a model without some of its channels, beside the whole one's.

What `--prune-shrink` leaves for the rest of a run, with random weights: forward, backward and adamwprune's step, all
rows in turn within a round. Activations are counted on tensors without values, so they are exact on any machine.
"""

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from launch.bench.pruned import CHANNEL, kept_channels
from launch.bench.timing import DEVICE, FREED, in_turn, measured, median_ratio, seconds
from toolkit.command import say
from toolkit.markdown import mib, page, table
from toolkit.memory.activations import track_step
from toolkit.optim import AdamWPrune, param_groups
from toolkit.process import keep_freed_memory
from toolkit.prune.channels import channel_groups
from toolkit.prune.groups import prunable_names
from toolkit.shrink import shrink

# (model, row) -> at most these times the dense step's time, and its activations.
BARS = {("resnet50", "channel 50%"): (0.8, 0.87)}


def bench_shrunk(model: str, rounds: int, batch_size: int, malloc: str) -> dict[str, Any]:
    """Times and activations of a training step, dense and with 30, 50 and 70 % of each inner width gone."""
    kept = malloc == "keep" and keep_freed_memory()
    torch.manual_seed(0)
    dense = timm.create_model(model)
    size = tuple(dense.pretrained_cfg["input_size"])  # type: ignore[index]
    groups = channel_groups(dense, torch.zeros(2, *size))
    models = {"dense": dense}
    models |= {f"channel {share:.0%}": shrink(dense, groups, kept_channels(groups, share))[0] for share in CHANNEL}
    images, labels = torch.randn(batch_size, *size, device=DEVICE), torch.zeros(batch_size, dtype=torch.int64)
    facts: dict[str, dict[str, int]] = {}
    measures: dict[str, Callable[[int], float]] = {}
    for name, one in models.items():
        say(f"{name}: counting activations")
        step = track_step(partial(copy.deepcopy, one), size, one.num_classes)  # type: ignore[arg-type]
        weights = sum(parameter.numel() for parameter in one.parameters())
        facts[name] = {"weights": weights, "activation_bytes": step.peak(batch_size).get("activations", 0)}
        measures[name] = partial(_timed, _step_of(one.train().to(DEVICE), images, labels.to(DEVICE)))
    for run in measures.values():
        run(0)  # makes moments, picks algorithms
    figures = in_turn(measures, rounds, model)
    rows = [
        {
            "name": name,
            **facts[name],
            "step_ms": 1e3 * statistics.median(figures[name]),
            "times_dense": median_ratio(figures, name, "dense"),
            "activations_of_dense": facts[name]["activation_bytes"] / facts["dense"]["activation_bytes"],
        }
        for name in models
    ]
    prunable = sum(dense.get_parameter(name).numel() for name in prunable_names(dense))
    threads = torch.get_num_threads()
    about = {"threads": threads, "batch_size": batch_size, "freed_memory": FREED[kept]}
    return {**measured(model, prunable, rounds), **about, "rows": rows}


def _step_of(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = AdamWPrune(param_groups(model), lr=1e-4)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(step: Callable[[], None], number: int) -> float:
    return seconds(step)


def to_markdown(result: dict[str, Any], command: str) -> str:
    """One table, and whether the bars are met."""
    lines = [
        f"# A training step without some of its channels: {result['model']}",
        "",
        f"Made by `{command}` on {result['date']}: {result['device']}, {result['threads']} threads, torch "
        f"{result['torch']}. Batch {result['batch_size']}, random weights, medians of {result['rounds']} rounds in "
        f"which every row makes a step in turn. {result['freed_memory']} (`--malloc`). `channel X%`: that share of "
        "each inner width is gone.",
        "",
        *table(
            ["row", "weights", "step ms", "× dense", "activations MiB", "× dense"],
            [
                [
                    row["name"],
                    f"{row['weights']:,}",
                    f"{row['step_ms']:.0f}",
                    f"{row['times_dense']:.2f}",
                    mib(row["activation_bytes"], 1),
                    f"{row['activations_of_dense']:.2f}",
                ]
                for row in result["rows"]
            ],
        ),
    ]
    for row in result["rows"]:
        bars = BARS.get((result["model"], row["name"]))
        if bars is not None:
            met = ["met" if value <= bar else "**missed**" for value, bar in zip(_reached(row), bars, strict=True)]
            lines += [
                "",
                f"Bars of {row['name']}: a step in at most {bars[0]} of the dense one's time ({met[0]}), activations "
                f"of at most {bars[1]} ({met[1]}). The residual streams' tensors stay, whatever goes.",
            ]
    return page(*lines)


def _reached(row: dict[str, Any]) -> tuple[float, float]:
    return row["times_dense"], row["activations_of_dense"]
