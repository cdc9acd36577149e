"""`python -m launch.bench optim`: step time and state of our optimizers beside others', interleaved in one process.

A timm model's parameters with random weights and gradients; each candidate has weights and state of its own. One round
steps every candidate once; the figures are medians over the rounds and medians of the ratios to fused AdamW (or fused
SGD) of the same round. Limits are this project's own bars; a row without one is shown for orientation.
"""

import contextlib
import gc
import importlib.util
import statistics
import time
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["bench_optim", "only", "to_markdown", "transient_bytes"]

ADAM, SGD = "torch AdamW fused", "torch SGD fused"
ADAM_BARS = {"cpu": {0.1: 1.15, 0.3: 1.15, 0.5: 1.0, 0.7: 0.9, 0.9: 0.65}, "cuda": {0.7: 0.75, 0.9: 0.6}}
SGD_BARS = {"cpu": {0.7: 1.0, 0.9: 0.8}, "cuda": {}}
MASK_UPDATE_LIMIT = 30  # ordinary steps
SELECTION_TRANSIENT_LIMIT_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Candidate:
    """One row: how to step it, its state in bytes, the row it is compared with, and the bar on that ratio."""

    name: str
    step: Callable[[], Any]
    prunable_bytes: int  # state of the prunable weights
    other_bytes: int  # state of norms and biases
    transient_bytes: int  # highest memory a step takes beyond what it leaves
    peer: str = ""
    limit: float | None = None


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def transient_bytes(function: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> int:
    """Highest memory that a call takes from torch's allocator beyond what was there before it.

    On CPU only what was made under watch is seen to go: what `function` frees must be made in `prepare`.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        prepare()
        _wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        _wait()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepare()
        with torch.profiler.record_function("measured"):
            function()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = before = peak = 0
    begun = False
    for event in events:
        if event.name() == "measured":
            begun, before, peak = True, now, now
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now) if begun else 0
    return peak - before


def _parameters(shapes: "Sequence[torch.Size]", gradients: "Sequence[torch.Tensor]") -> "list[torch.nn.Parameter]":
    import torch

    made = []
    for shape, gradient in zip(shapes, gradients, strict=True):
        parameter = torch.nn.Parameter(torch.randn(shape, device=gradient.device) * 0.05)
        parameter.grad = gradient
        made.append(parameter)
    return made


@contextlib.contextmanager
def only(isa: str | None) -> Iterator[None]:
    """Native code restricted to one instruction set; None leaves the choice to the processor."""
    from toolkit.kernels import native

    with unittest.mock.patch.object(native, "best_isa", return_value=isa) if isa else contextlib.nullcontext():
        yield


def _tensors(value: Any) -> "Iterator[torch.Tensor]":
    """The plain tensors of a state entry: of a quantized one its codes and scales."""
    import torch

    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        else:
            yield value


def _bytes(optimizer: Any, parameters: Any) -> int:
    """Bytes of all state of these parameters; a storage shared by several counts once."""
    found = {}
    for parameter in parameters:
        for value in optimizer.state.get(parameter, {}).values():
            for tensor in _tensors(value):
                whole = tensor.untyped_storage()  # of a counter, which is one of many in its storage, its own bytes
                found[tensor.data_ptr()] = tensor.nbytes if tensor.ndim == 0 else whole.nbytes()
    return sum(found.values())


def _makers(device: str) -> Iterator[tuple[str, Any, str, float | None, str | None]]:
    """(name, constructor, peer, limit, instruction set) of all rows."""
    import torch

    from toolkit.kernels import compiled, native
    from toolkit.optim import AdamWPrune, SGDPrune

    yield ADAM, partial(torch.optim.AdamW, fused=True), "", None, None
    yield "torch AdamW foreach", partial(torch.optim.AdamW, foreach=True), ADAM, None, None
    yield "torch AdamW loop", partial(torch.optim.AdamW, foreach=False), ADAM, None, None
    yield SGD, partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True), "", None, None
    once: dict[str, Any] = {"end_step": 1, "frequency": 1}
    for sparsity in (0.1, 0.3, 0.5, 0.7, 0.9):
        make = partial(AdamWPrune, sparsity=sparsity, **once)
        yield f"adamwprune {sparsity:.0%}", make, ADAM, ADAM_BARS[device].get(sparsity), None
    for sparsity in (0.5, 0.7, 0.9):
        make_sgd = partial(SGDPrune, lr=0.1, sparsity=sparsity, **once)
        yield f"sgdprune {sparsity:.0%}", make_sgd, SGD, SGD_BARS[device].get(sparsity), None
    if device == "cpu" and compiled.available():
        for isa in native.ISAS[: native.ISAS.index(native.best_isa())]:
            for sparsity in (0.7, 0.9):
                make = partial(AdamWPrune, sparsity=sparsity, **once)
                yield f"adamwprune {sparsity:.0%}, {isa} code", make, ADAM, None, isa
    reference = partial(AdamWPrune, sparsity=0.7, **once, implementation="reference")
    yield "adamwprune 70%, reference", reference, ADAM, None, None
    yield from _others()


def _others() -> Iterator[tuple[str, Any, str, float | None, str | None]]:
    """Other people's small or fast optimizers, where they are installed and their code builds."""
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW4bit, AdamW8bit

        yield "torchao AdamW8bit", AdamW8bit, ADAM, None, None
        yield "torchao AdamW4bit", AdamW4bit, ADAM, None, None
    if importlib.util.find_spec("deepspeed"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        yield "DeepSpeed CPU Adam", partial(DeepSpeedCPUAdam, adamw_mode=True), ADAM, None, None


def candidates(shapes: "Sequence[torch.Size]", log: Callable[[str], None]) -> list[Candidate]:
    """The rows, each with parameters of these shapes; one that fails is left out and logged."""
    import torch

    torch.manual_seed(0)
    device = _device()
    gradients = [torch.randn(shape, device=device) * 0.01 for shape in shapes]
    rows = []
    for name, make, peer, limit, isa in _makers(device):
        log(f"preparing {name}")
        parameters = _parameters(shapes, gradients)
        try:
            optimizer = make(parameters)
            for _ in range(3):  # state, masks, and what is compiled at the first packed step
                optimizer.step()
        except Exception as error:  # other people's code may fail to build in any way; it is said
            if not name.startswith(("torchao", "DeepSpeed")):
                raise
            log(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        rows.append(
            Candidate(
                name,
                _restricted(optimizer.step, isa) if isa else optimizer.step,
                _bytes(optimizer, [p for p in parameters if p.ndim > 1]),
                _bytes(optimizer, [p for p in parameters if p.ndim <= 1]),
                transient_bytes(optimizer.step),
                peer,
                limit,
            )
        )
    return rows


def _restricted(step: Callable[[], Any], isa: str) -> Callable[[], Any]:
    def restricted() -> None:
        with only(isa):
            step()

    return restricted


def time_mask_update(shapes: "Sequence[torch.Size]", rounds: int) -> dict[str, float]:
    """A step that changes the masks against an ordinary one before it, and the selection alone against torch.kthvalue.

    The selection chooses the lowest 70 % of all weights' magnitudes, in the chunks a mask update makes.
    """
    import torch

    from toolkit.optim import AdamWPrune
    from toolkit.prune.select import CHUNK, choose_lowest

    device = _device()
    parameters = _parameters(shapes, [torch.randn(shape, device=device) * 0.01 for shape in shapes])
    make = partial(AdamWPrune, sparsity=0.7, end_step=1000, frequency=2)
    optimizer = make(parameters)
    ordinary: list[float] = []
    updates: list[float] = []
    for step in range(1, 2 * rounds + 1):
        _wait()
        begin = time.perf_counter()
        optimizer.step()
        _wait()
        (ordinary if step % 2 else updates).append(time.perf_counter() - begin)
    ratios = [update / step for update, step in zip(updates[1:], ordinary[1:], strict=True)]
    watched = make(parameters)  # its 4th step packs anew what the 2nd has packed
    step_transient = transient_bytes(watched.step, prepare=lambda: [watched.step() for _ in range(3)])

    scores = [parameter.detach().view(-1) for parameter in parameters if parameter.ndim > 1]
    sources = [lambda s=s: (piece.abs() for piece in s.split(CHUNK)) for s in scores]
    names, sizes = [str(i) for i in range(len(scores))], [len(s) for s in scores]
    together = torch.cat(scores).abs()
    k = int(0.7 * together.numel())

    def select() -> None:
        for _ in choose_lowest(sources, names, sizes, k):
            pass

    selection: list[float] = []
    kth: list[float] = []
    for _ in range(3):
        for function, times in ((select, selection), (lambda: together.kthvalue(k), kth)):
            _wait()
            begin = time.perf_counter()
            function()
            _wait()
            times.append(time.perf_counter() - begin)
    return {
        "ordinary_step_s": statistics.median(ordinary[1:]),
        "mask_update_step_s": statistics.median(updates[1:]),
        "in_ordinary_steps": statistics.median(ratios),
        "in_ordinary_steps_limit": MASK_UPDATE_LIMIT,
        "selection_s": statistics.median(selection),
        "kthvalue_s": statistics.median(kth),
        "selection_transient_bytes": transient_bytes(select),
        "selection_transient_limit_bytes": SELECTION_TRANSIENT_LIMIT_BYTES,
        "step_transient_bytes": step_transient,
        "largest_layer_bytes": 4 * max(sizes),
    }


def bench_optim(model: str, rounds: int, log: Callable[[str], None]) -> dict[str, Any]:
    """Everything `launch.bench optim` measures, as one JSON object."""
    import timm
    import torch

    from toolkit.builder.metadata import cpu_name

    shapes = [parameter.shape for parameter in timm.create_model(model).parameters()]
    count = sum(shape.numel() for shape in shapes if len(shape) > 1)
    rows = candidates(shapes, log)
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for number in range(rounds):
        log(f"round {number + 1} of {rounds}")
        for row in rows:
            _wait()
            begin = time.perf_counter()
            row.step()
            _wait()
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
                "met": None if row.limit is None or ratio is None else ratio <= row.limit,
                "state_bytes_per_prunable_weight": row.prunable_bytes / count,
                "other_state_bytes_per_prunable_weight": row.other_bytes / count,
                "transient_bytes": row.transient_bytes,
            }
        )
    del rows
    log("mask updates")
    device = _device()
    return {
        "schema": "bench-optim/2",
        "model": model,
        "prunable_weights": count,
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU: {cpu_name()}",
        "kind": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": table,
        "mask_update": time_mask_update(shapes, rounds),
    }


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The table for results/bench/."""
    lines = [
        f"# Optimizer step, {result['model']}: {result['prunable_weights']:,} prunable weights",
        "",
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}; medians of {result['rounds']} "
        f"interleaved rounds in one process. Made by `{command}`.",
        "",
    ]
    if result["kind"] == "cpu":
        lines += ["**These are CPU figures. No GPU was at hand: the GPU column stays empty until one is.**", ""]
    lines += [
        "State is in bytes a prunable weight: of the prunable weights themselves, and of norms and biases. Transient: "
        "the highest memory an ordinary step takes beyond what it leaves.",
        "",
        "| optimizer | step ms | ratio to peer | bar | peer | state | state of norms, biases | transient MiB "
        "| GPU ratio |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        ratio = "" if row["ratio_to_peer"] is None else f"{row['ratio_to_peer']:.2f}"
        bar = "" if row["limit"] is None else f"≤ {row['limit']:.2f} {'met' if row['met'] else '**missed**'}"
        lines.append(
            f"| {row['name']} | {row['step_ms']:.1f} | {ratio} | {bar} | {row['peer'] or ''} "
            f"| {row['state_bytes_per_prunable_weight']:.3f} | {row['other_state_bytes_per_prunable_weight']:.3f} "
            f"| {row['transient_bytes'] / 2**20:.1f} | {ratio if result['kind'] == 'cuda' else ''} |"
        )
    mask = result["mask_update"]
    lines += [
        "",
        f"- A step that changes the masks takes {1e3 * mask['mask_update_step_s']:.0f} ms, "
        f"{mask['in_ordinary_steps']:.1f} ordinary steps (bar: ≤ {mask['in_ordinary_steps_limit']}); it takes "
        f"{mask['step_transient_bytes'] / 2**20:.1f} MiB for the time (the largest layer has "
        f"{mask['largest_layer_bytes'] / 2**20:.1f} MiB).",
        f"- The selection alone takes {1e3 * mask['selection_s']:.0f} ms (bar: that of `torch.kthvalue` on all scores "
        f"side by side, {1e3 * mask['kthvalue_s']:.0f} ms) and {mask['selection_transient_bytes'] / 2**20:.1f} MiB "
        f"(bar: ≤ {mask['selection_transient_limit_bytes'] / 2**20:.0f} MiB).",
    ]
    return "\n".join(lines) + "\n"
