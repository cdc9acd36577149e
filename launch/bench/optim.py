"""`python -m launch.bench optim`: step time and state of our optimizers beside others', interleaved in one process.

A timm model's parameters with random weights and gradients; each candidate has weights and state of its own. One round
steps every candidate once; the figures are medians over the rounds and medians of the ratios to fused AdamW (or fused
SGD) of the same round. Limits are this project's own bars; a row without one is shown for orientation.

A step can be no faster than memory: beside its time stands the share it reaches of the rate at which this machine
doubles tensors of the same shapes in place, counting the bytes that the step must read and write at least. The same for
the native code alone: what Python takes to look up the tensors is no question of the code.
"""

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from launch.bench.candidates import ADAM, SGD, Maker, candidates, random_gradients, step_bytes, with_gradients
from launch.bench.timing import DEVICE, in_turn, measured, median_ratio, parameter_shapes, seconds, transient_bytes
from toolkit.kernels import compiled, native
from toolkit.markdown import MIB, mib, page, table
from toolkit.optim import AdamWPrune, SGDPrune
from toolkit.prune.select import CHUNK, choose_lowest

ADAM_BARS = {0.1: 1.15, 0.3: 1.15, 0.5: 1.0, 0.7: 0.9, 0.9: 0.65}
SGD_BARS = {0.7: 1.0, 0.9: 0.8}
INT8_ADAM_BARS = {0.0: 0.75, 0.7: 0.7, 0.9: 0.6}
INT8_SGD_BARS = {0.0: 0.9}
MASK_UPDATE_LIMIT = 30  # ordinary steps
SELECTION_TRANSIENT_LIMIT_BYTES = 8 * MIB
BANDWIDTH_LIMIT = 0.85  # of the rate in place, at these sparsities
_BANDWIDTH_NAMES = tuple(f"{name} {sparsity}%" for name in ("adamwprune", "sgdprune") for sparsity in (0, 70, 90))
_IN_PLACE, _IN_ONE = "in place", "in place, one tensor"
_NO_GPU = "**These are CPU figures. No GPU was at hand; `python -m launch.bench device` times a step there.**"
_RATES = {"in_place_bytes_per_s": "in place", "in_one_tensor_bytes_per_s": "in one tensor"}
_HEADER = (
    "optimizer",
    "step ms",
    "ratio to peer",
    "bar",
    "of in-place rate",
    "code alone",
    "peer",
    "state",
    "state of norms, biases",
    "transient MiB",
)


def native_isas() -> tuple[str, ...]:
    """The instruction sets that native code has here, the best last."""
    runs = DEVICE == "cpu" and compiled.available()
    return native.ISAS[: native.ISAS.index(native.best_isa()) + 1] if runs else ()


def _makers() -> list[Maker]:
    adam = partial(AdamWPrune, end_step=1, frequency=1)
    sgd = partial(SGDPrune, lr=0.1, end_step=1, frequency=1)
    return [
        (ADAM, partial(torch.optim.AdamW, fused=True), "", None, None),
        ("torch AdamW foreach", partial(torch.optim.AdamW, foreach=True), ADAM, None, None),
        ("torch AdamW loop", partial(torch.optim.AdamW, foreach=False), ADAM, None, None),
        (SGD, partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True), "", None, None),
        *(
            (f"adamwprune {sparsity:.0%}", partial(adam, sparsity=sparsity), ADAM, ADAM_BARS.get(sparsity), None)
            for sparsity in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
        ),
        *(
            (f"sgdprune {sparsity:.0%}", partial(sgd, sparsity=sparsity), SGD, SGD_BARS.get(sparsity), None)
            for sparsity in (0.0, 0.5, 0.7, 0.9)
        ),
        *(
            (f"{name} int8 {sparsity:.0%}", partial(make, sparsity=sparsity, state_dtype="int8"), peer, bar, None)
            for name, make, peer, bars in (
                ("adamwprune", adam, ADAM, INT8_ADAM_BARS),
                ("sgdprune", sgd, SGD, INT8_SGD_BARS),
            )
            for sparsity, bar in bars.items()
        ),
        *(
            (
                f"adamwprune bfloat16 {sparsity:.0%}",
                partial(adam, sparsity=sparsity, state_dtype="bfloat16"),
                ADAM,
                None,
                None,
            )
            for sparsity in (0.0, 0.7)
        ),
        *(
            (f"adamwprune {sparsity:.0%}, {isa} code", partial(adam, sparsity=sparsity), ADAM, None, isa)
            for isa in native_isas()[:-1]
            for sparsity in (0.7, 0.9)
        ),
        ("adamwprune 70%, reference", partial(adam, sparsity=0.7, implementation="reference"), ADAM, None, None),
        *_others(),
    ]


def _others() -> Iterator[Maker]:
    """Other people's small or fast optimizers, where they are installed and their code builds."""
    if importlib.util.find_spec("torchao"):
        from torchao.optim import AdamW4bit, AdamW8bit

        yield "torchao AdamW8bit", AdamW8bit, ADAM, None, None
        yield "torchao AdamW4bit", AdamW4bit, ADAM, None, None
    if importlib.util.find_spec("deepspeed"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        yield "DeepSpeed CPU Adam", partial(DeepSpeedCPUAdam, adamw_mode=True), ADAM, None, None


def time_mask_update(shapes: Sequence[torch.Size], rounds: int) -> dict[str, float]:
    """A step that changes the masks against an ordinary one before it, and the selection alone against torch.kthvalue.

    The selection chooses the lowest 70 % of all weights' magnitudes, in the chunks a mask update makes.
    """
    parameters = with_gradients(random_gradients(shapes))
    make = partial(AdamWPrune, parameters, sparsity=0.7, end_step=1000, frequency=2)
    step = partial(_step_s, make().step)
    taken = in_turn({"ordinary": step, "update": step}, rounds, "mask updates")
    steps = {name: figures[1:] for name, figures in taken.items()}
    watched = make()  # its 4th step packs anew what the 2nd has packed
    step_transient = transient_bytes(watched.step, prepare=lambda: [watched.step() for _ in range(3)])

    scores = [parameter.detach().view(-1) for parameter in parameters if parameter.ndim > 1]
    sources = [lambda s=s: (piece.abs() for piece in s.split(CHUNK)) for s in scores]
    names, sizes = [str(i) for i in range(len(scores))], [len(s) for s in scores]
    together = torch.cat(scores).abs()
    k = int(0.7 * together.numel())

    def select() -> None:
        for _ in choose_lowest(sources, names, sizes, k, device=together.device):
            pass

    ways = {"select": partial(_step_s, select), "kthvalue": partial(_step_s, partial(together.kthvalue, k))}
    choosing = in_turn(ways, 3, "selection")
    return {
        "ordinary_step_s": statistics.median(steps["ordinary"]),
        "mask_update_step_s": statistics.median(steps["update"]),
        "in_ordinary_steps": median_ratio(steps, "update", "ordinary"),
        "in_ordinary_steps_limit": MASK_UPDATE_LIMIT,
        "selection_s": statistics.median(choosing["select"]),
        "kthvalue_s": statistics.median(choosing["kthvalue"]),
        "selection_transient_bytes": transient_bytes(select),
        "selection_transient_limit_bytes": SELECTION_TRANSIENT_LIMIT_BYTES,
        "step_transient_bytes": step_transient,
        "largest_layer_bytes": 4 * max(sizes),
    }


class _Timed:
    """A native library whose calls are timed: `taken_s` collects their seconds."""

    def __init__(self, library: Any) -> None:
        self.library, self.taken_s = library, 0.0

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self.library, name)

        def call(*arguments: Any) -> None:
            self.taken_s += seconds(partial(function, *arguments))

        return call


def _steps_and_code(
    steps: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of the steps in turn, and of the native code within each."""
    library = _Timed(native.native_code() if native_isas() else None)
    code: dict[str, list[float]] = {name: [] for name in steps}

    def measure(name: str, step: Callable[[], Any], number: int) -> float:
        library.taken_s = 0.0
        taken = seconds(step)
        code[name].append(library.taken_s)
        return taken

    with patch.object(native, "native_code", lambda: library):
        return in_turn({name: partial(measure, name, step) for name, step in steps.items()}, rounds, "steps"), code


def bench_optim(model: str, rounds: int, only_bars: bool = False) -> dict[str, Any]:
    """Everything `launch.bench optim` measures on this machine, as one JSON object. Raises ValueError on a GPU."""
    if DEVICE == "cuda":  # whose clock here would be Python's
        raise ValueError("launch.bench optim is for CPUs; python -m launch.bench device times a step on a GPU")
    shapes = parameter_shapes(model)
    count = sum(shape.numel() for shape in shapes if len(shape) > 1)
    found = candidates(shapes, count, [one for one in _makers() if not only_bars or _has_bar(*one)])
    steps: dict[str, Callable[[], Any]] = {row["name"]: step for step, row in found}
    like = [torch.ones(shape, device=DEVICE) for shape in shapes if len(shape) > 1]
    whole = torch.ones(count, device=DEVICE)
    steps |= {_IN_PLACE: partial(torch._foreach_mul_, like, 2.0), _IN_ONE: partial(whole.mul_, 2.0)}
    (times, code), rows = _steps_and_code(steps, rounds), [row for _, row in found]
    del found, steps, like, whole  # weights and states, before the mask update is measured
    for row in rows:
        row["step_ms"] = 1e3 * statistics.median(times[row["name"]])
        slower = median_ratio(times, row["name"], _IN_PLACE)
        row["share_of_in_place_rate"] = step_bytes(row) / (8 * slower)
        if all(code[row["name"]]):
            slower = median_ratio({**times, "code": code[row["name"]]}, "code", _IN_PLACE)
            row["code_share_of_in_place_rate"] = step_bytes(row) / (8 * slower)
        if row["peer"]:
            row["ratio_to_peer"] = median_ratio(times, row["name"], row["peer"])
        if row["limit"] is not None:
            row["met"] = row["ratio_to_peer"] <= row["limit"]
    return {
        **measured(model, count, rounds),
        "threads": torch.get_num_threads(),
        "in_place_bytes_per_s": 8 * count / statistics.median(times[_IN_PLACE]),
        "in_one_tensor_bytes_per_s": 8 * count / statistics.median(times[_IN_ONE]),
        "native_code": next(iter(native_isas()[-1:]), None),
        "rows": rows,
        "mask_update": time_mask_update(shapes, rounds),
    }


def _has_bar(name: str, make: Any, peer: str, limit: float | None, isa: str | None) -> bool:
    """Whether a row has a bar, or is what others are held against."""
    return limit is not None or not peer or name in _BANDWIDTH_NAMES


def _step_s(step: Callable[[], Any], number: int) -> float:
    return seconds(step)


def with_other_machines(result: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What results/bench/optim.json holds: a result a machine; this machine's takes the place of an older one."""
    others = [other for other in known.get("machines", ()) if other["device"] != result["device"]]
    return {"schema": "bench-optim/3", "machines": [*others, result]}


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The page for results/bench/: our bars on all machines side by side, then a section a machine."""
    machines = result["machines"]
    first = machines[0]
    lines = [
        f"# Optimizer step, {first['model']}: {first['prunable_weights']:,} prunable weights",
        "",
        f"Medians of interleaved rounds in one process. Made by `{command}`, on each machine.",
        "",
        _NO_GPU,
        "",
        "State is in bytes a prunable weight: of the prunable weights themselves, and of norms and biases. Transient: "
        "the highest memory an ordinary step takes beyond what it leaves.",
        "",
        "Of in-place rate: bytes a second that a step must move, over those of doubling tensors of the same shapes in "
        "place. Code alone: the same of the native code, without what Python takes to look up the tensors. "
        f"The bar of {BANDWIDTH_LIMIT:.0%} at 0, 70 and 90 % is the code's; at 0 % it is torch's, and the step counts. "
        "One tensor of that size is faster than many.",
        "",
        "## Ratio to the peer, and share of the in-place rate",
        "",
        *_side_by_side(machines),
    ]
    for machine in machines:
        lines += ["", *_section(machine)]
    return page(*lines)


def _side_by_side(machines: Sequence[Mapping[str, Any]]) -> list[str]:
    by_name = [{row["name"]: row for row in machine["rows"]} for machine in machines]
    names = [row["name"] for row in machines[-1]["rows"] if row["limit"] or row["name"] in _BANDWIDTH_NAMES]
    rows = []
    for name in names:
        limit = by_name[-1][name]["limit"]
        cells = [_ratio_and_share(rows_of.get(name)) for rows_of in by_name]
        rows.append([name, f"≤ {limit:.2f}" if limit else "", *cells])
    return table(["optimizer", "bar", *(machine["device"] for machine in machines)], rows, text=(0,))


def _ratio_and_share(row: Mapping[str, Any] | None) -> str:
    if row is None or row["ratio_to_peer"] is None:
        return ""
    share = _judged_share(row)
    missed = " **missed**" if row["met"] is False or _below(row) else ""
    return f"{row['ratio_to_peer']:.2f}{'' if share is None else f', {share:.0%}'}{missed}"


def _judged_share(row: Mapping[str, Any]) -> float | None:
    """The code's, or the whole step's where that is not known: torch's own code, and machines measured before."""
    found = row.get("code_share_of_in_place_rate", row.get("share_of_in_place_rate"))
    return None if found is None else float(found)


def _below(row: Mapping[str, Any]) -> bool:
    share = _judged_share(row)
    return row["name"] in _BANDWIDTH_NAMES and share is not None and share < BANDWIDTH_LIMIT


def _section(machine: Mapping[str, Any]) -> list[str]:
    rows = []
    for row in machine["rows"]:
        ratio = "" if row["ratio_to_peer"] is None else f"{row['ratio_to_peer']:.2f}"
        shares = [row.get(f"{whose}share_of_in_place_rate") for whose in ("", "code_")]
        shown = ["" if share is None else f"{share:.0%}" for share in shares]
        shown[shares[1] is not None] += " **missed**" if _below(row) else ""
        rows.append(
            [
                row["name"],
                f"{row['step_ms']:.1f}",
                ratio,
                "" if row["limit"] is None else f"≤ {row['limit']:.2f} {'met' if row['met'] else '**missed**'}",
                *shown,
                row["peer"] or "",
                *(f"{row[f'{whose}state_bytes_per_prunable_weight']:.3f}" for whose in ("", "other_")),
                mib(row["transient_bytes"], 1),
            ]
        )
    mask = machine["mask_update"]
    rates = "".join(f", {machine[key] / 1e9:.1f} GB/s {words}" for key, words in _RATES.items() if key in machine)
    code = f", {machine['native_code']} code" if machine.get("native_code") else ""
    return [
        f"## {machine['device']}",
        "",
        f"{machine['date']}: {machine['threads']} threads, torch {machine['torch']}, {machine['rounds']} rounds"
        f"{code}{rates}.",
        "",
        *table(_HEADER, rows, text=(0, 6)),
        "",
        f"- A step that changes the masks takes {1e3 * mask['mask_update_step_s']:.0f} ms, "
        f"{mask['in_ordinary_steps']:.1f} ordinary steps (bar: ≤ {mask['in_ordinary_steps_limit']}); it takes "
        f"{mib(mask['step_transient_bytes'], 1)} MiB for the time (the largest layer has "
        f"{mib(mask['largest_layer_bytes'], 1)} MiB).",
        f"- The selection alone takes {1e3 * mask['selection_s']:.0f} ms (bar: that of `torch.kthvalue` on all scores "
        f"side by side, {1e3 * mask['kthvalue_s']:.0f} ms) and {mib(mask['selection_transient_bytes'], 1)} MiB "
        f"(bar: ≤ {mib(mask['selection_transient_limit_bytes'], 0)} MiB).",
    ]
