"""`python -m launch.bench optim`: step time and state of our optimizers beside torch's, interleaved in one process.

ResNet-50's parameters with random weights and gradients; each candidate has weights and state of its own. One round
steps every candidate once; the figures are medians over the rounds and medians of the ratios to fused AdamW (or fused
SGD) of the same round. Limits are this project's own bars; a bar without one is shown for orientation.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["main"]


@dataclass(frozen=True)
class Candidate:
    """One row: how to step it, its state in bytes, the row it is compared with, and the bar on that ratio."""

    name: str
    step: Callable[[], Any]
    state_bytes: int
    peer: str = ""
    limit: float | None = None


def _parameters(shapes: "Sequence[torch.Size]", gradients: "Sequence[torch.Tensor]") -> "list[torch.nn.Parameter]":
    import torch

    made = []
    for shape, gradient in zip(shapes, gradients, strict=True):
        parameter = torch.nn.Parameter(torch.randn(shape) * 0.05)
        parameter.grad = gradient
        made.append(parameter)
    return made


@contextlib.contextmanager
def _only(isa: str) -> Iterator[None]:
    """Native code restricted to one instruction set."""
    from toolkit.kernels import native

    with unittest.mock.patch.object(native, "best_isa", return_value=isa):
        yield


def _bytes(optimizer: Any, prunable: Any) -> int:
    import torch

    return sum(
        value.untyped_storage().nbytes()
        for parameter, state in optimizer.state.items()
        if parameter in prunable
        for value in state.values()
        if torch.is_tensor(value)
    )


def candidates(model: str) -> tuple[list[Candidate], int]:
    """(rows, prunable weights) for a timm model's shapes."""
    import timm
    import torch

    from toolkit.kernels import compiled, native
    from toolkit.optim import AdamWPrune, SGDPrune

    torch.manual_seed(0)
    shapes = [parameter.shape for parameter in timm.create_model(model).parameters()]
    gradients = [torch.randn(shape) * 0.01 for shape in shapes]
    count = sum(shape.numel() for shape in shapes if len(shape) > 1)
    rows = []

    def add(name: str, make: Any, peer: str = "", limit: float | None = None, isa: str | None = None) -> None:
        parameters = _parameters(shapes, gradients)
        optimizer = make(parameters)
        prunable = {parameter for parameter in parameters if parameter.ndim > 1}
        step = optimizer.step
        if isa is not None:

            def step() -> None:
                with _only(isa):
                    optimizer.step()

        optimizer.step()
        optimizer.step()
        rows.append(Candidate(name, step, _bytes(optimizer, prunable), peer, limit))

    adam, sgd = "torch AdamW fused", "torch SGD fused"
    add(adam, lambda p: torch.optim.AdamW(p, fused=True))
    add("torch AdamW foreach", lambda p: torch.optim.AdamW(p, foreach=True), adam)
    add("torch AdamW loop", lambda p: torch.optim.AdamW(p, foreach=False), adam)
    add(sgd, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True))
    once: dict[str, Any] = {"end_step": 1, "frequency": 1}
    adam_bars = ((0.1, 1.15), (0.3, 1.15), (0.5, 1.0), (0.7, 0.9), (0.9, 0.65))
    sgd_bars: tuple[tuple[float, float | None], ...] = ((0.5, None), (0.7, 1.0), (0.9, 0.8))
    for sparsity, limit in adam_bars:
        add(f"adamwprune {sparsity:.0%}", lambda p, s=sparsity: AdamWPrune(p, sparsity=s, **once), adam, limit)
    for sparsity, bar in sgd_bars:
        add(f"sgdprune {sparsity:.0%}", lambda p, s=sparsity: SGDPrune(p, lr=0.1, sparsity=s, **once), sgd, bar)
    if compiled.available():
        for isa in native.ISAS[: native.ISAS.index(native.best_isa())]:
            for sparsity in (0.7, 0.9):
                make = lambda p, s=sparsity: AdamWPrune(p, sparsity=s, **once)  # noqa: E731
                add(f"adamwprune {sparsity:.0%}, {isa} code", make, adam, isa=isa)
    add("adamwprune 70%, reference", lambda p: AdamWPrune(p, sparsity=0.7, **once, implementation="reference"), adam)
    return rows, count


def time_mask_update(model: str, rounds: int) -> dict[str, float]:
    """Seconds of a step that changes the masks, of an ordinary one before it, and of torch.kthvalue on all scores."""
    import timm
    import torch

    from toolkit.optim import AdamWPrune

    shapes = [parameter.shape for parameter in timm.create_model(model).parameters()]
    parameters = _parameters(shapes, [torch.randn(shape) * 0.01 for shape in shapes])
    optimizer = AdamWPrune(parameters, sparsity=0.7, end_step=40, frequency=2)
    ordinary: list[float] = []
    updates: list[float] = []
    kth: list[float] = []
    for step in range(1, 2 * rounds + 1):
        begin = time.perf_counter()
        optimizer.step()
        (ordinary if step % 2 else updates).append(time.perf_counter() - begin)
    scores = torch.cat([parameter.detach().abs().view(-1) for parameter in parameters if parameter.ndim > 1])
    for _ in range(3):
        begin = time.perf_counter()
        scores.kthvalue(int(0.7 * scores.numel()))
        kth.append(time.perf_counter() - begin)
    return {
        "ordinary_step_s": statistics.median(ordinary[1:]),
        "mask_update_step_s": statistics.median(updates),
        "kthvalue_s": statistics.median(kth),
    }


def bench_optim(model: str, rounds: int) -> dict[str, Any]:
    """Everything `launch.bench optim` measures, as one JSON object."""
    import torch

    from toolkit.build.facts import cpu_name

    rows, count = candidates(model)
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(rounds):
        for row in rows:
            begin = time.perf_counter()
            row.step()
            times[row.name].append(time.perf_counter() - begin)
    table = []
    for row in rows:
        ratio = None
        if row.peer:
            ratio = statistics.median(a / b for a, b in zip(times[row.name], times[row.peer], strict=True))
        table.append(
            {
                "name": row.name,
                "step_ms": 1e3 * statistics.median(times[row.name]),
                "peer": row.peer or None,
                "ratio_to_peer": ratio,
                "limit": row.limit,
                "state_bytes_per_prunable_weight": row.state_bytes / count,
            }
        )
    mask = time_mask_update(model, rounds)
    return {
        "schema": "bench-optim/1",
        "model": model,
        "prunable_weights": count,
        "rounds": rounds,
        "device": f"CPU: {cpu_name()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": table,
        "mask_update": {**mask, "in_ordinary_steps": mask["mask_update_step_s"] / mask["ordinary_step_s"], "limit": 30},
        "gpu": None,
    }


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The table for results/bench/."""
    lines = [
        f"# Optimizer step, {result['model']}: {result['prunable_weights']:,} prunable weights",
        "",
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}; medians of {result['rounds']} "
        f"interleaved rounds in one process. Made by `{command}`.",
        "",
        "**No GPU figures: none was measured.** The GPU column stays empty until it is.",
        "",
        "| optimizer | step ms | ratio to peer | bar | peer | state bytes a prunable weight | GPU step ms |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    for row in result["rows"]:
        ratio = "" if row["ratio_to_peer"] is None else f"{row['ratio_to_peer']:.2f}"
        bar = "" if row["limit"] is None else f"≤ {row['limit']:.2f}"
        state = f"{row['state_bytes_per_prunable_weight']:.3f}"
        lines.append(f"| {row['name']} | {row['step_ms']:.1f} | {ratio} | {bar} | {row['peer'] or ''} | {state} | |")
    mask = result["mask_update"]
    lines += [
        "",
        f"A step that changes the masks takes {1e3 * mask['mask_update_step_s']:.0f} ms, "
        f"{mask['in_ordinary_steps']:.1f} ordinary steps (bar: ≤ {mask['limit']}); `torch.kthvalue` over all scores at "
        f"once, for comparison, {1e3 * mask['kthvalue_s']:.0f} ms.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and measure."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench", description=__doc__)
    parser.add_argument("what", choices=("optim",), help="what to measure")
    parser.add_argument("--model", default="resnet50", help="timm model whose shapes are used (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line on stdout")
    parser.add_argument("--out", type=Path, help="folder for optim.json and optim.md, for example results/bench")
    options = parser.parse_args(argv)
    result = bench_optim(options.model, options.rounds)
    arguments = sys.argv[1:] if argv is None else argv
    text = to_markdown(result, shlex.join(["python", "-m", "launch.bench", *arguments]))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "optim.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "optim.md").write_text(text)
    print(json.dumps(result) if options.json else text)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
