"""`python -m launch.bench device`: what an optimizer step takes of a GPU, and apart from it of the host.

Device time: steps captured in a CUDA graph and replayed between two events; where capture fails, steps given one after
the other, and the row says so. Host time: what it takes to give the device a step, without waiting for it. The rate is
the bytes that a step must move at least over the device time, and its share is of the rate at which this device copies
one large tensor. On a CPU, a stand-in for tests, both times are the clock's.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from launch.bench.candidates import ADAM, SGD, Maker, candidates, random_gradients, step_bytes, with_gradients
from launch.bench.timing import DEVICE, in_turn, measured, median_ratio, parameter_shapes, seconds, wait
from toolkit.command import say
from toolkit.markdown import page, table
from toolkit.optim import AdamWPrune, SGDPrune

ADAM_BARS = {0.7: 0.75, 0.9: 0.6} if DEVICE == "cuda" else {}
INT8_BARS = {0.0: 0.7, 0.7: 0.6} if DEVICE == "cuda" else {}
_COPY = "copy"
_COPIED_BYTES = 2**28  # far beyond a GPU's caches
_STEPS, _HOST_STEPS = 20, 5  # of a graph; few enough that the queue of launches never fills
_WHOSE = "device" if DEVICE == "cuda" else "cpu"
_SHOWN = 8  # kernels of a mask update
_WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")
_HEADER = (
    "optimizer",
    "device ms",
    "ratio to peer",
    "bar",
    "host ms",
    "GB/s",
    "of copy rate",
    "peer",
    "state bytes a weight",
    "timed by",
)


def _makers() -> list[Maker]:
    adam = partial(AdamWPrune, end_step=1, frequency=1)
    sgd = partial(SGDPrune, lr=0.1, end_step=1, frequency=1)
    torchs = partial(torch.optim.AdamW, capturable=DEVICE == "cuda")
    return [
        (ADAM, partial(torchs, fused=True), "", None, None),
        ("torch AdamW foreach", partial(torchs, foreach=True), ADAM, None, None),
        (SGD, partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True), "", None, None),
        *(
            (f"adamwprune {sparsity:.0%}", partial(adam, sparsity=sparsity), ADAM, ADAM_BARS.get(sparsity), None)
            for sparsity in (0.0, 0.5, 0.7, 0.9)
        ),
        *(
            (f"sgdprune {sparsity:.0%}", partial(sgd, sparsity=sparsity), SGD, None, None)
            for sparsity in (0.0, 0.7, 0.9)
        ),
        *(
            (
                f"adamwprune {sparsity:.0%}, bfloat16 state",
                partial(adam, sparsity=sparsity, state_dtype="bfloat16"),
                ADAM,
                None,
                None,
            )
            for sparsity in (0.0, 0.7)
        ),
        *(
            (
                f"adamwprune {sparsity:.0%}, int8 state",
                partial(adam, sparsity=sparsity, state_dtype="int8"),
                ADAM,
                INT8_BARS.get(sparsity),
                None,
            )
            for sparsity in (0.0, 0.7)
        ),
        ("sgdprune 0%, int8 state", partial(sgd, sparsity=0.0, state_dtype="int8"), SGD, None, None),
    ]


class _Steps:
    """Many steps as one thing to give the device: a captured graph, or where there is none the steps themselves."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self._step, self._run, self.timed_by = step, self._many, "clock"
        if DEVICE == "cuda":
            self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._many()
            self._run, self.timed_by = graph.replay, "graph"
        except RuntimeError as error:  # a step that reads the device cannot be captured
            self.timed_by = f"events, not captured: {str(error).splitlines()[0][:60]}"
            torch.cuda.synchronize()

    def _many(self) -> None:
        for _ in range(_STEPS):
            self._step()

    def seconds_a_step(self, number: int = 0) -> float:
        """Device seconds."""
        if DEVICE == "cpu":
            return seconds(self._step)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / _STEPS


def _host_s(step: Callable[[], Any], number: int) -> float:
    """Seconds to give the device a step."""
    wait()
    begin = time.perf_counter()
    for _ in range(_HOST_STEPS):
        step()
    taken = time.perf_counter() - begin
    wait()
    return taken / _HOST_STEPS


def profile_mask_update(shapes: Sequence[torch.Size]) -> dict[str, Any]:
    """A step that changes the masks: its seconds beside an ordinary one's, its launches, its waits, its kernels."""
    optimizer = AdamWPrune(with_gradients(random_gradients(shapes)), sparsity=0.7, end_step=1000, frequency=2)
    for _ in range(4):  # the fourth packs anew what the second has packed
        optimizer.step()
    ordinary_s, update_s = seconds(optimizer.step), seconds(optimizer.step)
    optimizer.step()
    wait()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if DEVICE == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        optimizer.step()
        wait()
    rows = profiler.key_averages()
    spent = sorted(
        ((getattr(row, f"self_{_WHOSE}_time_total") / 1e3, row.count, row.key) for row in rows), reverse=True
    )
    return {
        "ordinary_s": ordinary_s,
        "update_s": update_s,
        "launches": sum(row.count for row in rows if "LaunchKernel" in row.key) if DEVICE == "cuda" else None,
        "waits": sum(row.count for row in rows if row.key.endswith(_WAITS)) - 1 if DEVICE == "cuda" else None,  # ours
        "longest": [{"name": key, "count": count, "ms": ms} for ms, count, key in spent[:_SHOWN]],
    }


def bench_device(model: str, rounds: int) -> dict[str, Any]:
    """The times of every row, and one mask update, as one JSON object."""
    shapes = parameter_shapes(model)
    count = sum(shape.numel() for shape in shapes if len(shape) > 1)
    found = candidates(shapes, count, _makers())
    size = _COPIED_BYTES if DEVICE == "cuda" else 4 * count
    source, target = (torch.ones(size // 4, device=DEVICE) for _ in range(2))
    many = {row["name"]: _Steps(step) for step, row in found}
    many[_COPY] = _Steps(partial(target.copy_, source))
    times = in_turn({name: steps.seconds_a_step for name, steps in many.items()}, rounds, "steps")
    host = in_turn({row["name"]: partial(_host_s, step) for step, row in found}, rounds, "host")
    rate = 2 * size / statistics.median(times[_COPY])
    rows = [_row(row, times, host[row["name"]], rate, count, many[row["name"]].timed_by) for _, row in found]
    del found, many, source, target  # weights and states, before the mask update is measured
    say("profiling a mask update")
    return {
        "schema": "bench-device/1",
        **measured(model, count, rounds),
        "copy_bytes_per_s": rate,
        "rows": rows,
        "mask_update": profile_mask_update(shapes),
    }


def _row(
    row: Mapping[str, Any],
    times: Mapping[str, Sequence[float]],
    host_s: Sequence[float],
    copy_rate: float,
    count: int,
    timed_by: str,
) -> dict[str, Any]:
    name, peer, limit = row["name"], row["peer"], row["limit"]
    device_s = statistics.median(times[name])
    rate = step_bytes(row) * count / device_s
    ratio = median_ratio(times, name, peer) if peer else None
    return {
        "name": name,
        "peer": peer,
        "device_ms": 1e3 * device_s,
        "host_ms": 1e3 * statistics.median(host_s),
        "ratio_to_peer": ratio,
        "limit": limit,
        "met": None if limit is None or ratio is None else ratio <= limit,
        "bytes_per_s": rate,
        "share_of_copy_rate": rate / copy_rate,
        "state_bytes_per_prunable_weight": row["state_bytes_per_prunable_weight"],
        "timed_by": timed_by,
    }


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The page of a model on one device."""
    rows = [
        [
            row["name"],
            f"{row['device_ms']:.3f}",
            "" if row["ratio_to_peer"] is None else f"{row['ratio_to_peer']:.2f}",
            "" if row["limit"] is None else f"≤ {row['limit']:.2f} {'met' if row['met'] else '**missed**'}",
            f"{row['host_ms']:.3f}",
            f"{row['bytes_per_s'] / 1e9:,.0f}",
            f"{row['share_of_copy_rate']:.0%}",
            row["peer"] or "",
            f"{row['state_bytes_per_prunable_weight']:.3f}",
            row["timed_by"],
        ]
        for row in result["rows"]
    ]
    mask = result["mask_update"]
    counts = "" if mask["launches"] is None else f", {mask['launches']:,} launches and {mask['waits']:,} waits"
    longest = [[f"`{one['name'][:80]}`", one["count"], f"{one['ms']:.2f}"] for one in mask["longest"]]
    return page(
        f"# Optimizer step on {result['device']}: {result['model']}, {result['prunable_weights']:,} prunable weights",
        "",
        f"{result['date']}, torch {result['torch']}, medians of {result['rounds']} rounds; copying takes "
        f"{result['copy_bytes_per_s'] / 1e9:,.0f} GB/s. Made by `{command}`."
        + (" **A CPU's clock, a stand-in: no figure of a GPU.**" if result["kind"] == "cpu" else ""),
        "",
        *table(_HEADER, rows, text=(0, 7, 9)),
        "",
        f"A step that changes the masks takes {1e3 * mask['update_s']:.1f} ms on the clock, an ordinary one "
        f"{1e3 * mask['ordinary_s']:.2f} ms{counts}.",
        "",
        *table(["of it", "count", "ms"], longest),
    )
