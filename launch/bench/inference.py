"""`python -m launch.bench inference RUN...`: what zeros and removed channels are worth once a model is trained.

Each row is a model: dense, with zeros by three patterns, without channels, or what a run ended with. All rows of a
model are timed in turn within a round, in one process, through each way to run it; figures are medians over the
rounds, ratios those of the same round. A pattern with a bar says whether it was met.
"""

import importlib.metadata
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from launch.bench.pruned import Family, random_family, run_family
from launch.bench.timing import DEVICE, FREED, device_name, in_turn, median_ratio, seconds, transient_bytes
from launch.formats import onnx_session, write_onnx_file
from toolkit.command import say
from toolkit.markdown import mib, page, table
from toolkit.process import keep_freed_memory
from toolkit.semi_structured import to_semi_structured

ENGINES = ("eager", "compile", "onnx")
_TITLES = {
    "eager": "torch, eager, CPU",
    "compile": "torch.compile, CPU",
    "onnx": "ONNX Runtime, CPU",
    "gpu": "torch, eager, GPU, float16 (2:4: semi-structured linear layers)",
}
# Images/s against dense, in eager torch on CPU at the largest batch: (model, row) -> at least.
BARS = {("resnet50", "channel 50%"): 1.35, ("resnet50", "channel 70%"): 1.9}
_CALLS = 5  # of a batch of one in a round
_DENSE_FLOPS = ("weight", "N:M")
_NO_SPEED = 1.1  # times dense, within which rows that do the same work lie
Run = Callable[[Tensor], Any]


def bench_inference(
    run: Sequence[Path],
    models: Sequence[str],
    rounds: int,
    batches: Sequence[int],
    engines: Sequence[str],
    threads: int,
    channel_multiple: int,
    malloc: str,
) -> dict[str, Any]:
    """All rows of all models; `run` are run folders."""
    if unknown := [engine for engine in engines if engine not in ENGINES]:
        raise ValueError(f"--engines {unknown[0]} is not known; choose from {', '.join(ENGINES)}")
    if min(rounds, threads, channel_multiple, min(batches, default=0)) < 1:
        raise ValueError(
            f"--rounds {rounds}, --threads {threads}, --channel-multiple {channel_multiple}, --batches {list(batches)} "
            "must be 1 or more"
        )
    before = torch.get_num_threads()
    kept = malloc == "keep" and keep_freed_memory()
    torch.set_num_threads(threads)
    ways = [*engines, *(["gpu"] if DEVICE == "cuda" else [])]
    try:
        makers = [
            *(partial(random_family, name, channel_multiple) for name in models),
            *(partial(run_family, one) for one in run),
        ]
        families = [_measured(make(), rounds, sorted(batches), ways, threads) for make in makers]
    finally:
        torch.set_num_threads(before)
    return {
        "schema": "bench-inference/1",
        "date": date.today().isoformat(),
        "device": device_name(),
        "kind": DEVICE,
        "torch": torch.__version__,
        "onnxruntime": importlib.metadata.version("onnxruntime") if "onnx" in engines else None,
        "threads": threads,
        "freed_memory": FREED[kept],
        "rounds": rounds,
        "batches": sorted(batches),
        "engines": ways,
        "families": families,
        "bars": [bar for family in families for bar in _bars(family, max(batches))],
    }


def _measured(family: Family, rounds: int, batches: Sequence[int], ways: Sequence[str], threads: int) -> dict[str, Any]:
    """A family's rows with their times."""
    images = {batch: torch.randn(batch, *family.input_size) for batch in batches}
    samples: dict[str, list[float]] = {}
    measures: dict[str, Callable[[int], float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), _room_to_compile():
        for one in family.candidates:
            one.facts["peak_bytes"] = _peak_bytes(one.model, images[batches[-1]])
            for way in ways:
                say(f"{family.name}, {one.name}: preparing {way}")
                run = _prepared(way, one.model, images[batches[0]], Path(folder), threads)
                for batch, given in images.items():
                    key = f"{way} {batch} {one.name}"
                    run(given)  # compiles, or picks its algorithms
                    samples[key] = []
                    measures[key] = partial(_sample, run, given, samples[key], _CALLS if batch == 1 else 1)
        figures = in_turn(measures, rounds, family.name)
    dense = family.candidates[0]
    rows = []
    for one in family.candidates:
        times: dict[str, dict[str, Any]] = {way: {} for way in ways}
        for way in ways:
            for batch in batches:
                key, base = f"{way} {batch} {one.name}", f"{way} {batch} {dense.name}"
                times[way][str(batch)] = {
                    "p50_ms": 1e3 * statistics.median(samples[key]),
                    "p95_ms": 1e3 * float(np.quantile(samples[key], 0.95)),
                    "images_per_s": batch / statistics.median(figures[key]),
                    "times_dense": 1 / median_ratio(figures, key, base),
                }
        bound = dense.facts["flops"] / one.facts["flops"]
        rows.append({"name": one.name, "pattern": one.pattern, **one.facts, "flop_bound": bound, "times": times})
    return {"name": family.name, "input_size": list(family.input_size), "note": family.note, "rows": rows}


def _sample(run: Run, images: Tensor, samples: list[float], calls: int, number: int) -> float:
    """Median seconds of some calls, which go to the samples."""
    taken = [seconds(partial(run, images)) for _ in range(calls)]
    samples += taken
    return statistics.median(taken)


def _prepared(way: str, model: nn.Module, images: Tensor, folder: Path, threads: int) -> Run:
    """How to run a model one way."""
    if way == "eager":
        return model
    if way == "compile":
        return torch.compile(model, dynamic=False)
    if way == "gpu":
        import copy

        moved = copy.deepcopy(model).half().cuda()
        to_semi_structured(moved)
        return lambda batch: moved(batch.half().cuda())
    file = folder / "model.onnx"
    with torch.inference_mode(False), torch.no_grad():
        write_onnx_file(model, torch.zeros(2, *images.shape[1:]), file)
    session = onnx_session(file, threads)
    entry = session.get_inputs()[0].name
    return lambda batch: session.run(None, {entry: batch.numpy()})


@contextmanager
def _room_to_compile() -> Iterator[None]:
    """Every row and batch compiled for itself; torch would go back to eager code after eight of one model, silently."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        yield
    torch._dynamo.reset()


def _peak_bytes(model: nn.Module, images: Tensor) -> int:
    """Weights, a batch, and the most that a forward pass of it takes besides."""
    model(images)  # what is made once
    held = sum(tensor.nbytes for tensor in model.state_dict().values()) + images.nbytes
    return held + transient_bytes(partial(model, images)) if DEVICE == "cpu" else held


def _bars(family: Mapping[str, Any], batch: int) -> list[dict[str, Any]]:
    found = []
    for row in family["rows"]:
        bar = BARS.get((family["name"], row["name"].partition(" by ")[0]))
        if bar is not None and "eager" in row["times"]:
            reached = row["times"]["eager"][str(batch)]["times_dense"]
            entry = {"model": family["name"], "row": row["name"], "batch": batch, "bar": bar, "times_dense": reached}
            found.append({**entry, "flop_bound": row["flop_bound"], "met": reached >= bar})
    return found


def to_markdown(result: dict[str, Any], command: str) -> str:
    """What it is, what it takes, how fast it runs; a section a model."""
    lines = [
        "# Inference: what zeros and removed channels are worth",
        "",
        f"Made by `{command}` on {result['date']}: {result['device']}, {result['threads']} threads, torch "
        f"{result['torch']}, ONNX Runtime {result['onnxruntime'] or 'not asked'}. Float32, medians of "
        f"{result['rounds']} rounds in which every row is run in turn, in one process. {result['freed_memory']} "
        "(`--malloc`).",
        "`channel X%`: that share of each inner width is removed (of heads, to the nearest), `by N`: then the "
        "nearest multiple of N stays. `weight X%`: the smallest of each layer are zero. × dense: images/s against the "
        "dense row of the same round.",
    ]
    if result["kind"] != "cuda":
        lines += ["", "**No GPU was at hand: there are no GPU columns.**"]
    lines += _scattered(result)
    if result["bars"]:
        header = ["bar", "at least", "reached", "FLOP bound", "met"]
        cells = [
            [
                f"{bar['model']}, {bar['row']}, batch {bar['batch']}, eager",
                f"{bar['bar']:.2f} ×",
                f"{bar['times_dense']:.2f} ×",
                f"{bar['flop_bound']:.2f} ×",
                "yes" if bar["met"] else "**no**",
            ]
            for bar in result["bars"]
        ]
        lines += ["", *table(header, cells, text=(0, 4))]
    for family in result["families"]:
        lines += _section(family, result["engines"], result["batches"])
    return page(*lines)


def _scattered(result: Mapping[str, Any]) -> list[str]:
    """In words and numbers: what scattered zeros do for speed, and what removed channels do."""
    batch, way, lines = str(result["batches"][-1]), result["engines"][0], []
    for family in result["families"]:
        text, most = {}, 0.0
        for kind, patterns in (("zeros", _DENSE_FLOPS), ("channels", ("channel",))):
            rows = [row for row in family["rows"][1:] if row["pattern"] in patterns]
            times = [row["times"][way][batch]["times_dense"] for row in rows]
            most = max(times, default=0.0) if kind == "zeros" else most
            text[kind] = ", ".join(f"{row['name']} {time:.2f} ×" for row, time in zip(rows, times, strict=True))
        if text["zeros"]:
            verdict = "give no speed" if most < _NO_SPEED else "were timed apart, which noise may be"
            channels = f"; removed channels: {text['channels']}" if text["channels"] else ""
            zeros = f"scattered zeros {verdict} ({text['zeros']} dense), for every zero is multiplied"
            lines += ["", f"{family['name']}, {_TITLES[way]}, batch {batch}: {zeros}{channels}."]
    return lines


def _section(family: Mapping[str, Any], ways: Sequence[str], batches: Sequence[int]) -> list[str]:
    shape = " × ".join(map(str, family["input_size"]))
    note = f" {family['note'][0].upper()}{family['note'][1:]}." if family["note"] else ""
    lines = ["", f"## {family['name']}", "", f"Images of {shape}.{note}"]
    sizes = ["row", "top-1 %", "weights", "not zero", "GFLOPs", "file MiB", "packed MiB", "zip MiB"]
    sizes.append(f"peak MiB, batch {batches[-1]}")
    cells = [
        [
            row["name"],
            f"{row['top1']:.2f}" if "top1" in row else "–",
            f"{row['weights']:,}",
            f"{row['not_zero']:,}",
            f"{row['flops'] / 1e9:.2f}",
            *(mib(row[f"{kind}_bytes"], 1) for kind in ("dense", "packed", "zip", "peak")),
        ]
        for row in family["rows"]
    ]
    lines += ["", *table(sizes, cells)]
    kept = [
        [
            row["name"],
            ", ".join(f"{whole} → {kept}" for whole, kept in row["widths"]),
            f"{100 * row['channels_gone']:.1f} %",
        ]
        for row in family["rows"]
        if "widths" in row
    ]
    if kept:
        lines += ["", *table(["row", "inner widths", "of all inner channels gone"], kept, text=(0, 1))]
    for way in ways:
        header = ["row", "FLOP bound"]
        for batch in batches:
            header += [f"p50 / p95 ms, batch {batch}", f"images/s, batch {batch}", "× dense"]
        cells = []
        for row in family["rows"]:
            line = [row["name"], f"{row['flop_bound']:.2f} ×"]
            for batch in batches:
                time = row["times"][way][str(batch)]
                line += [f"{time['p50_ms']:.1f} / {time['p95_ms']:.1f}", f"{time['images_per_s']:.1f}"]
                line.append(f"{time['times_dense']:.2f}")
            cells.append(line)
        lines += ["", f"### {_TITLES[way]}", "", *table(header, cells)]
    return lines
