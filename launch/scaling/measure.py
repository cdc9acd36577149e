"""The runs and probes of `launch.scaling`; what is there already is taken as it is."""

import argparse
import math
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

from launch.start import ROOT, accelerate_launch, environment, installed
from toolkit.builder.resume import check_same_settings
from toolkit.cli import parse
from toolkit.engine.history import is_complete
from toolkit.files import read_json, write_json
from toolkit.progress import Progress

ENGINE_FILES = {
    "ddp": "cpu",
    "fsdp2": "fsdp2",
    "zero1": "deepspeed_zero1",
    "zero2": "deepspeed_zero2",
    "zero3": "deepspeed_zero3",
}
_COUNTED_RANKS = (2, 3)
# Flags of the runs whose collectives are counted: two epochs with pruning on.
_COUNTED = (
    f"--global-batch-size {6 * max(_COUNTED_RANKS)} --epochs 2 --opt adamwprune --sparsity 0.7 --prune-begin 0 "
    "--prune-frequency 5 -j 0"
).split()
# glibc gives the heap's top back to the system when a step's last tensor is freed, and the next step pays page faults:
# 0.5 to 4 ms a step, for whichever loop happens to free last. Both loops are measured with memory that stays.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**25)}  # its largest
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "-1"}


def _launch(file: Path, ranks: int, program: list[str], log: Path, **variables: str) -> None:
    """Start a program on `ranks` ranks. Raises RuntimeError, with the log's end, where it fails."""
    command = installed(accelerate_launch(file, *program, ranks=ranks))
    with open(log, "w") as output:
        status = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment(**variables)
        ).returncode
    if status:
        raise RuntimeError(f"{log} ended with status {status}:\n" + "\n".join(log.read_text().splitlines()[-15:]))


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def _row(kind: str, ranks: int, folder: Path) -> dict[str, Any]:
    """A finished run's figures; the first epoch is left out of the rates."""
    metrics, reduced = read_json(folder / "metrics.json"), read_json(folder / "memory.json")["reduced"]
    first = metrics["steps_per_epoch"] if metrics["epochs"] > 1 else 0
    peaks = [row for name, row in reduced.items() if name.startswith("phases.") and name.endswith(".total")]
    fullest = max(peaks, key=lambda row: row["max"])
    allocated = reduced["peaks.life.allocated_peak_bytes"]
    return {
        "kind": kind,
        "ranks": ranks,
        "global_batch_size": metrics["global_batch_size"],
        "batch_size_per_rank": metrics["global_batch_size"] // ranks,
        "images_per_sec": statistics.median(v for s, v in _scalars(folder, "train/images_per_sec") if s > first),
        "data_wait_percent": statistics.fmean(v for s, v in _scalars(folder, "train/data_wait(%)") if s > first),
        "ledger_peak_bytes": {"min": fullest["min"], "max": fullest["max"]},
        "allocated_peak_bytes": allocated and allocated["max"],
        "device": metrics["device"],
        "on_gpu": metrics["device_type"] == "cuda",
        "threads_per_rank": metrics["threads_per_rank"],
        "loss": _scalars(folder, "train/loss"),
        "final_top1": metrics["final_top1"],
    }


def _train(file: Path, ranks: int, flags: list[str], batch: int, runs: Path, kind: str) -> dict[str, Any]:
    name = f"{kind}-{ranks}"
    mine = [*flags, "--log-interval", "5", "--global-batch-size", str(batch), "--output", str(runs)]
    mine += ["--report-to", "tensorboard"]  # `_row` reads it
    check_same_settings(runs / name, parse(mine))
    if not is_complete(runs / name):
        _launch(file, ranks, ["train.py", *mine, "--experiment", name, "--resume", "auto"], runs / f"{name}.log")
    return _row(kind, ranks, runs / name)


def _probe(
    file: Path, ranks: int, what: str, flags: list[str], runs: Path, variables: dict[str, str]
) -> dict[str, Any]:
    """What a rank program of launch.scaling.rank found; kept for a second call."""
    name = f"{what}-{file.stem}-{ranks}"
    kept, result = runs / f"{name}.json", runs / f"{name}.result"
    if kept.exists():
        before = read_json(kept)
        if before["flags"] != flags:
            raise ValueError(f"{kept} was measured with other flags; remove {runs} or give another --runs")
        return before["found"]
    shutil.rmtree(runs / "probes" / name, ignore_errors=True)  # of a probe that was stopped
    place = ["--output", str(runs / "probes"), "--experiment", name]
    program = ["-m", "launch.scaling.rank", what, str(result), *flags, *place]
    _launch(file, ranks, program, runs / f"{name}.log", **variables)
    found = read_json(result)
    write_json(kept, {"flags": flags, "found": found})
    return found


def _count(model: str, flags: list[str], runs: Path, bar: Progress) -> dict[str, Any]:
    """Facts of a model, and counted collectives of every engine at 2 and 3 ranks on CPU, with pruning on."""
    flags = [*flags, *_COUNTED, "--model", model]
    files = {engine: ROOT / "accelerate_configs" / f"{name}.yaml" for engine, name in ENGINE_FILES.items()}
    facts = {engine: _probe(files[engine], 2, "facts", flags, runs, _NO_GPU) for engine in ("ddp", "fsdp2")}
    counted = {}
    for engine, file in files.items():
        for ranks in _COUNTED_RANKS:
            found = _probe(file, ranks, "collectives", flags, runs, _NO_GPU)
            assert found["engine"] == engine, f"{file} ran {found['engine']}"
            counted[f"{engine}-{ranks}"] = found["counted"]
            bar.advance(1, f"counted {engine} at {ranks}")
    return {"model": model, "facts": facts, "counted": counted}


def measure_scaling(file: Path, ranks: list[int], flags: list[str], runs: Path, count_model: str) -> dict[str, Any]:
    """All runs, probes and counts; those that `runs` holds already are taken as they are."""
    runs.mkdir(parents=True, exist_ok=True)
    settings = parse(flags)
    most = max(ranks)
    batch = settings.global_batch_size or settings.batch_size * most * settings.grad_accum_steps
    step = math.lcm(*ranks) * settings.grad_accum_steps
    if batch % step:
        raise ValueError(f"--global-batch-size {batch} does not divide over {ranks} ranks; use a multiple of {step}")
    if settings.mixed_precision != "no" or settings.mixes or settings.grad_accum_steps > 1 or settings.clip_grad:
        raise ValueError("the bare loop has no --amp, mixup, accumulation or clipping to compare with; leave them out")
    flags = _without_batch(flags)
    rows: list[dict[str, Any]] = []
    loops = []
    with Progress(3 * len(ranks) - 1 + 2 * len(ENGINE_FILES), "runs", "scaling") as bar:
        for count in ranks:
            for kind, size in (("strong", batch), ("weak", batch // most * count)):
                if kind == "weak" and count == most:  # the same run
                    rows.append({**rows[-1], "kind": "weak"})
                    continue
                rows.append(_train(file, count, flags, size, runs, kind))
                bar.advance(1, f"{kind} at {count}")
        for count in ranks:
            loops.append(
                _probe(
                    file, count, "loop", [*flags, "--global-batch-size", str(batch // most * count)], runs, _KEEP_MEMORY
                )
            )
            bar.advance(1, f"loop at {count}")
        counts = _count(count_model, flags, runs, bar)
    return {"schema": "scaling/1", "model": settings.model, "rows": rows, "loops": loops, "collectives": counts}


def _without_batch(flags: list[str]) -> list[str]:
    """The flags without those that set the batch; scaling sets it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-b", "--batch-size")
    parser.add_argument("--global-batch-size")
    return parser.parse_known_args(flags)[1]
