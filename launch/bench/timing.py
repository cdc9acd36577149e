"""What the benches measure with: figures of one machine, taken in turn and compared within a round."""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from typing import Any

import torch

from toolkit.builder.metadata import cpu_name
from toolkit.progress import tracked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The device that is measured, for a report."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU: {cpu_name(with_family=True)}"


def measured(model: str, prunable_weights: int, rounds: int) -> dict[str, Any]:
    """What a result says of itself: when, of what and where it was measured."""
    return {
        "date": date.today().isoformat(),
        "model": model,
        "prunable_weights": prunable_weights,
        "rounds": rounds,
        "device": device_name(),
        "kind": DEVICE,
        "torch": torch.__version__,
    }


# Whether freed memory is kept -> what a report says.
FREED = {True: "Freed memory is kept for the next tensor", False: "Freed memory goes back to the system"}


def parameter_shapes(model: str) -> list[torch.Size]:
    """The shapes of a timm model's parameters."""
    import timm

    return [parameter.shape for parameter in timm.create_model(model).parameters()]


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """What a call takes on the clock, with all the work it gives the device."""
    wait()
    begin = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begin


def in_turn(measures: Mapping[str, Callable[[int], float]], rounds: int, label: str) -> dict[str, list[float]]:
    """One figure of each measure a round, whose number it is given: whatever the machine does meets all alike."""
    figures: dict[str, list[float]] = {name: [] for name in measures}
    for number in tracked(range(rounds), "rounds", label):
        for name, measure in measures.items():
            figures[name].append(measure(number))
    return figures


def median_ratio(figures: Mapping[str, Sequence[float]], mine: str, *others: str) -> float:
    """Median over the rounds of mine / sum of the others."""
    rows = zip(figures[mine], *(figures[name] for name in others), strict=True)
    return statistics.median(value / sum(parts) for value, *parts in rows)


def transient_bytes(function: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> int:
    """Highest memory that a call takes from torch's allocator beyond what was there before it.

    On CPU only what was made under watch is seen to go: what `function` frees must be made in `prepare`.
    """
    gc.collect()
    if DEVICE == "cuda":
        prepare()
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        wait()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepare()
        with torch.profiler.record_function("measured"):
            function()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    begin = [event.name() for event in events].index("measured")
    changes = [event.nbytes() for event in events[begin:] if event.name() == "[memory]"]
    return max(itertools.accumulate(changes, initial=0))
