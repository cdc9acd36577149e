"""`python -m launch.gpu_check --minutes 9 --out DIR`: everything about this project that needs a GPU, in one command.

On whatever one GPU is there (CUDA or ROCm): the GPU tests, `launch.bench optim`, memory of ResNet-50 by optimizer and
pruning beside the prediction, and a short training comparison on images made on the device. Results are written after
each part, so it may be stopped at any time. Without a GPU it says so and exits 2.
"""

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["compare_training", "main", "measure_memory", "to_markdown"]

MIB = 2**20
# The study's six optimizers without pruning, then with the pruning it gave them and with ours.
MEMORY_ROWS = (
    "sgd",
    "adam",
    "adamw",
    "adamwadv",
    "adamwspam",
    "adamwprune",
    "sgdprune",
    "adamw-magnitude",
    "adamw-movement",
    "sgd-movement",
    "adam-movement",
    "adamwadv-movement",
    "adamwspam-movement",
    "sgd-magnitude",
    "adam-magnitude",
    "adamwadv-magnitude",
    "adamwspam-magnitude",
    "adam-state",
    "adamwadv-state",
    "adamwspam-state",
)
TRAINED = ("sgd", "adamw", "adamw-magnitude", "sgd-magnitude", "adamwprune", "sgdprune")
_OPTIONAL = ("pytest", "hypothesis", "webdataset", "sklearn", "matplotlib", "torchao", "deepspeed")


def _optimizer(model: "torch.nn.Module", name: str, begin_step: int, end_step: int, lr: float = 1e-3) -> Any:
    from timm.optim import create_optimizer_v2

    from toolkit.optim.registry import find_spec

    spec = find_spec(name)
    assert spec is not None, name
    pruning: dict[str, Any] = {}
    if spec.method != "none":
        pruning = {"sparsity": 0.7, "begin_step": begin_step, "end_step": end_step, "frequency": 1}
    return create_optimizer_v2(model, name, lr=lr, weight_decay=1e-4, **pruning)


def measure_memory(
    model_name: str, opt: str, batch_size: int, amp: str | None, size: int, device: "torch.device"
) -> dict[str, Any]:
    """Allocator's peak of a step, dense and at 70 %, beside the prediction; None without an allocator (on CPU)."""
    import timm
    import torch

    from toolkit.builder.predict import Prediction
    from toolkit.config import Config
    from toolkit.memory.allocator import read_device, reset_peaks
    from toolkit.optim.registry import find_spec

    spec = find_spec(opt)
    sparsity = None if spec is None or spec.method == "none" else 0.7
    prediction = Prediction(Config(model=model_name, opt=opt, sparsity=sparsity, amp=amp, img_size=size))
    row: dict[str, Any] = {
        "model": model_name,
        "opt": opt,
        "batch_size": batch_size,
        "amp": amp,
        "predicted_bytes": prediction.peaks(batch_size),
        "measured_bytes": {},
        "reserved_peak_bytes": None,
        "cache_released_bytes": None,
    }
    model = timm.create_model(model_name, num_classes=1000).to(device).train()
    dtype = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    dense_steps, end = 4, 7
    optimizer = _optimizer(model, opt, dense_steps, end)
    try:
        for step in range(1, end + 4):
            if step in (dense_steps, end + 3):
                reset_peaks(device)
            images = torch.randn(batch_size, 3, size, size, device=device)
            labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            reading = read_device(device)
            if step == end and reading["reserved_bytes"] is not None:  # the last mask update is done
                torch.cuda.empty_cache()
                row["cache_released_bytes"] = reading["reserved_bytes"] - torch.cuda.memory_reserved(device)
            if step == dense_steps:
                row["measured_bytes"]["dense"] = reading["allocated_peak_bytes"]
            if step == end + 3:
                row["measured_bytes"]["final"] = reading["allocated_peak_bytes"]
                row["reserved_peak_bytes"] = reading["reserved_peak_bytes"]
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).splitlines()[0]
    row["predicted_ledger"] = prediction.ledgers(batch_size)
    return row


def _images(count: int, size: int, classes: int, seed: int, device: "torch.device") -> tuple[Any, Any]:
    """Drawn on the device: each class is a smooth pattern, each image a shifted, noisy copy of it."""
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    patterns_of = torch.Generator(device).manual_seed(12345)
    coarse = torch.randn(classes, 3, 8, 8, device=device, generator=patterns_of)
    patterns = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    labels = torch.randint(0, classes, (count,), device=device, generator=generator)
    shift = torch.randint(0, size, (count, 2), device=device, generator=generator)
    rows = (torch.arange(size, device=device)[None] + shift[:, :1]) % size
    columns = (torch.arange(size, device=device)[None] + shift[:, 1:]) % size
    images = patterns[labels]
    images = images.gather(2, rows[:, None, :, None].expand_as(images))
    images = images.gather(3, columns[:, None, None, :].expand_as(images))
    return images + 2.0 * torch.randn(images.shape, device=device, generator=generator), labels


def compare_training(
    model_name: str,
    opt: str,
    seed: int,
    steps: int,
    batch_size: int,
    size: int,
    device: "torch.device",
    num_images: int = 2_000,
) -> dict[str, Any]:
    """Train on drawn images to 70 % sparsity; top-1 in percent on held-out ones, zeros counted, images per second."""
    import timm
    import torch

    torch.manual_seed(seed)
    classes = 100
    train_images, train_labels = _images(num_images, size, classes, 1, device)
    test_images, test_labels = _images(num_images, size, classes, 2, device)
    model = timm.create_model(model_name, num_classes=classes).to(device).train()
    lr = 0.1 if opt.startswith(("sgd", "momentum")) else 2e-3
    optimizer = _optimizer(model, opt, 0, max(2, steps * 6 // 10), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, cycle_momentum=False)
    order = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    for _ in range(steps):
        batch = torch.randint(0, len(train_labels), (batch_size,), generator=order).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(train_images[batch]), train_labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    final_loss = float(loss)
    rate = steps * batch_size / (time.perf_counter() - begin)
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(part).argmax(1) == labels).sum())
            for part, labels in zip(test_images.split(250), test_labels.split(250), strict=True)
        )
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    return {
        "model": model_name,
        "opt": opt,
        "seed": seed,
        "steps": steps,
        "top1": 100 * right / len(test_labels),
        "final_loss": final_loss,
        "images_per_sec": rate,
        "sparsity": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
    }


class _Report:
    """The results so far, written after each part."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.result: dict[str, Any] = {"schema": "gpu-check/1", **facts, "memory": [], "training": []}

    def save(self) -> None:
        for name, text in (
            ("gpu_check.json", json.dumps(self.result, indent=1)),
            ("gpu_check.md", to_markdown(self.result)),
        ):
            temporary = self.out / f"{name}.tmp"
            temporary.write_text(text + "\n")
            temporary.replace(self.out / name)


def to_markdown(result: dict[str, Any]) -> str:
    """The tables of a check."""
    lines = [
        f"# GPU check: {result['device']}",
        "",
        f"torch {result['torch']}, {result['total_bytes'] / 2**30:.0f} GiB. Made by `{result['command']}`. Not "
        f"installed, so left out: {', '.join(result['missing']) or 'nothing'}.",
        "",
        f"GPU tests: {result.get('tests', 'not run')}",
    ]
    if "optim" in result:
        from launch.bench.optim import to_markdown as optim

        lines += ["", optim(result["optim"], result["command"])]
    if result["memory"]:
        lines += [
            "",
            "## Memory of a step, MiB allocated at its peak (synthetic batches, 224 px)",
            "",
            "| model | optimizer | batch | AMP | dense measured | predicted | 70 % measured | predicted | released "
            "| reserved |",
            "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
    for row in result["memory"]:
        cells = [row["model"], row["opt"], str(row["batch_size"]), row["amp"] or "float32"]
        for phase in ("dense", "final"):
            cells += [_mib(row["measured_bytes"].get(phase)), _mib(row["predicted_bytes"][phase])]
        cells.append(_mib(row["cache_released_bytes"]))
        lines.append(f"| {' | '.join([*cells, row.get('error') or _mib(row['reserved_peak_bytes'])])} |")
    if result["training"]:
        lines += [
            "",
            "## Training on images drawn on the device (SYNTHETIC: they rank nothing but this task)",
            "",
            "| model | optimizer | seed | steps | top-1 | sparsity | images/s |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
    for row in result["training"]:
        lines.append(
            f"| {row['model']} | {row['opt']} | {row['seed']} | {row['steps']} | {row['top1']:.1f} "
            f"| {100 * row['sparsity']:.2f} % | {row['images_per_sec']:.0f} |"
        )
    return "\n".join(lines)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.1f}"


def _command(arguments: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=limit_s)


def _parts(report: _Report, left_s: Callable[[], float], device: "torch.device") -> Iterator[str]:
    """Run one part after the other; gives the name of each when it is done."""
    import torch

    if importlib.util.find_spec("pytest"):
        done = _command(["pytest", "-q", "--no-header", "tests/gpu"], max(30.0, left_s()))
        report.result["tests"] = (done.stdout.strip().splitlines() or ["no output"])[-1]
        report.result["tests_output"] = done.stdout[-4000:]
        yield "GPU tests"
    done = _command(["launch.bench", "optim", "--json", "--rounds", "30"], max(60.0, left_s()))
    if done.returncode == 0:
        report.result["optim"] = json.loads(done.stdout.splitlines()[-1])
    else:
        report.result["optim_error"] = done.stderr[-2000:]
    yield "bench optim"
    for amp in (None, "bf16"):
        for batch_size in (128, 256):
            for opt in MEMORY_ROWS:
                if left_s() < 0.35 * report.result["minutes"] * 60:
                    break
                report.result["memory"].append(measure_memory("resnet50", opt, batch_size, amp, 224, device))
                gc.collect()
                torch.cuda.empty_cache()
                yield f"memory of {opt}, batch {batch_size}, {amp or 'float32'}"
    for seed in (0, 1, 2):
        for opt in TRAINED:
            if left_s() < 20:
                return
            report.result["training"].append(compare_training("resnet50", opt, seed, 300, 256, 64, device))
            yield f"training with {opt}, seed {seed}"


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and check."""
    parser = argparse.ArgumentParser(prog="python -m launch.gpu_check", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="time to use, about (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and gpu_check.md")
    options = parser.parse_args(argv)
    import torch

    import toolkit.optim  # noqa: F401  the names in timm's factory

    if not torch.cuda.is_available():
        parser.exit(2, "launch.gpu_check: error: torch sees no GPU here; nothing was measured\n")
    begin = time.monotonic()

    def left_s() -> float:
        return options.minutes * 60 - (time.monotonic() - begin)

    device = torch.device("cuda", 0)
    report = _Report(
        options.out,
        {
            "device": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "minutes": options.minutes,
            "total_bytes": torch.cuda.get_device_properties(device).total_memory,
            "command": f"python -m launch.gpu_check --minutes {options.minutes:g} --out {options.out}",
            "missing": [name for name in _OPTIONAL if importlib.util.find_spec(name) is None],
        },
    )
    try:
        for part in _parts(report, left_s, device):
            report.save()
            print(f"{time.monotonic() - begin:6.0f} s  {part}", file=sys.stderr, flush=True)  # noqa: T201
    except KeyboardInterrupt:
        print("stopped; what was measured is written", file=sys.stderr)  # noqa: T201
    finally:
        report.save()
    print(to_markdown(report.result))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
