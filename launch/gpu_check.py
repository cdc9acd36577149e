"""`python -m launch.gpu_check --minutes 9 --out DIR`: everything about this project that needs a GPU, in one command.

On whatever one GPU is there (CUDA or ROCm): the GPU tests, `launch.bench optim`, memory of ResNet-50 by optimizer and
pruning beside the prediction, and a short training comparison on images made on the device. Results are written after
each part, so it may be stopped at any time. Without a GPU it says so and exits 2.
"""

import gc
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from launch.bench.optim import to_markdown as optim_to_markdown
from toolkit.builder.predict import Prediction
from toolkit.command import command_parser, say, spelled
from toolkit.config import Config
from toolkit.files import write_result
from toolkit.markdown import mib, page, table
from toolkit.memory.allocator import read_device, reset_peaks
from toolkit.optim.registry import specs

# Dense, pruned by state, then with the pruning that the study gave them. Not twice the same: momentum is SGD's ledger,
# adamw-state is adamwprune.
MEMORY_ROWS = tuple(spec.name for spec in specs() if spec.base != "momentum" and spec.name != "adamw-state")
TRAINED = ("sgd", "adamw", "adamw-magnitude", "sgd-magnitude", "adamwprune", "sgdprune")
_SPARSITY = 0.7
_OPTIONAL = ("pytest", "hypothesis", "webdataset", "sklearn", "matplotlib", "torchao", "deepspeed")


def _prunes(name: str) -> bool:
    return any(spec.name == name and spec.method != "none" for spec in specs())


def _optimizer(model: torch.nn.Module, name: str, begin_step: int, end_step: int, lr: float = 1e-3) -> Any:
    pruning: dict[str, Any] = {"sparsity": _SPARSITY, "begin_step": begin_step, "end_step": end_step, "frequency": 1}
    return create_optimizer_v2(model, name, lr=lr, weight_decay=1e-4, **(pruning if _prunes(name) else {}))


def _step(model: torch.nn.Module, optimizer: Any, images: Tensor, labels: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Train on a batch, in autocast to `dtype` if there is one; the loss."""
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        loss = cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss


def measure_memory(
    model_name: str, opt: str, batch_size: int, amp: str | None, size: int, device: torch.device
) -> dict[str, Any]:
    """Allocator's peak of a step, dense and at 70 %, beside the prediction; None without an allocator (on CPU)."""
    sparsity = _SPARSITY if _prunes(opt) else None
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
    measured = {dense_steps: "dense", end + 3: "final"}
    optimizer = _optimizer(model, opt, dense_steps, end)
    try:
        for step in range(1, end + 4):
            if step in measured:
                reset_peaks(device)
            images = torch.randn(batch_size, 3, size, size, device=device)
            _step(model, optimizer, images, torch.zeros(batch_size, dtype=torch.int64, device=device), dtype)
            reading = read_device(device)
            if step == end and reading["reserved_bytes"] is not None:  # the last mask update is done
                torch.cuda.empty_cache()
                row["cache_released_bytes"] = reading["reserved_bytes"] - torch.cuda.memory_reserved(device)
            if step in measured:
                row["measured_bytes"][measured[step]] = reading["allocated_peak_bytes"]
        row["reserved_peak_bytes"] = reading["reserved_peak_bytes"]
    except torch.OutOfMemoryError as error:
        row["error"] = str(error).splitlines()[0]
    row["predicted_ledger"] = prediction.ledgers(batch_size)
    return row


def _images(count: int, size: int, classes: int, seed: int, device: torch.device) -> tuple[Any, Any]:
    """Drawn on the device: each class is a smooth pattern, each image a shifted, noisy copy of it."""
    generator = torch.Generator(device).manual_seed(seed)
    patterns_of = torch.Generator(device).manual_seed(12345)
    coarse = torch.randn(classes, 3, 8, 8, device=device, generator=patterns_of)
    patterns = interpolate(coarse, size=(size, size), mode="bicubic")
    labels = torch.randint(0, classes, (count,), device=device, generator=generator)
    shift = torch.randint(0, size, (count, 2), device=device, generator=generator)
    rows, columns = ((torch.arange(size, device=device) + first) % size for first in shift[:, :, None].unbind(1))
    channels = torch.arange(3, device=device)[:, None, None]
    images = patterns[labels[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]]
    return images + 2.0 * torch.randn(images.shape, device=device, generator=generator), labels


def compare_training(
    model_name: str,
    opt: str,
    seed: int,
    steps: int,
    batch_size: int,
    size: int,
    device: torch.device,
    num_images: int = 2_000,
) -> dict[str, Any]:
    """Train on drawn images to 70 % sparsity; top-1 in percent on held-out ones, zeros counted, images per second."""
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
        loss = _step(model, optimizer, train_images[batch], train_labels[batch], torch.bfloat16)
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
        lines += ["", optim_to_markdown(result["optim"], result["command"])]
    if result["memory"]:
        header = ["model", "optimizer", "batch", "AMP", "dense measured", "predicted", "70 % measured", "predicted"]
        title = "## Memory of a step, MiB allocated at its peak (synthetic batches, 224 px)"
        cells = map(_memory_cells, result["memory"])
        lines += ["", title, "", *table([*header, "released", "reserved"], cells, text=(0, 1, 3))]
    if result["training"]:
        rows = [
            [
                *(row[key] for key in ("model", "opt", "seed", "steps")),
                f"{row['top1']:.1f}",
                f"{100 * row['sparsity']:.2f} %",
                f"{row['images_per_sec']:.0f}",
            ]
            for row in result["training"]
        ]
        title = "## Training on images drawn on the device (SYNTHETIC: they rank nothing but this task)"
        header = ["model", "optimizer", "seed", "steps", "top-1", "sparsity", "images/s"]
        lines += ["", title, "", *table(header, rows, text=(0, 1))]
    return page(*lines)


def _memory_cells(row: dict[str, Any]) -> list[object]:
    sizes = [row[f"{how}_bytes"].get(phase) for phase in ("dense", "final") for how in ("measured", "predicted")]
    return [
        *(row["model"], row["opt"], row["batch_size"], row["amp"] or "float32"),
        *(mib(size, 1) for size in (*sizes, row["cache_released_bytes"])),
        row.get("error") or mib(row["reserved_peak_bytes"], 1),
    ]


def _command(arguments: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=limit_s)


def _parts(result: dict[str, Any], left_s: Callable[[], float], device: torch.device) -> Iterator[str]:
    """Run one part after the other; gives the name of each when it is done."""
    if importlib.util.find_spec("pytest"):
        done = _command(["pytest", "-q", "--no-header", "tests/gpu"], max(30.0, left_s()))
        result["tests"] = (done.stdout.strip().splitlines() or ["no output"])[-1]
        result["tests_output"] = done.stdout[-4000:]
        yield "GPU tests"
    done = _command(["launch.bench", "optim", "--json", "--rounds", "30"], max(60.0, left_s()))
    if done.returncode == 0:
        result["optim"] = json.loads(done.stdout.splitlines()[-1])
    else:
        result["optim_error"] = done.stderr[-2000:]
    yield "bench optim"
    for amp, batch_size, opt in itertools.product((None, "bf16"), (128, 256), MEMORY_ROWS):
        if left_s() < 0.35 * result["minutes"] * 60:
            break
        result["memory"].append(measure_memory("resnet50", opt, batch_size, amp, 224, device))
        gc.collect()
        torch.cuda.empty_cache()
        yield f"memory of {opt}, batch {batch_size}, {amp or 'float32'}"
    for seed, opt in itertools.product((0, 1, 2), TRAINED):
        if left_s() < 20:
            return
        result["training"].append(compare_training("resnet50", opt, seed, 300, 256, 64, device))
        yield f"training with {opt}, seed {seed}"


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and check."""
    parser = command_parser(
        "launch.gpu_check",
        __doc__,
        {
            "--minutes": {"type": float, "default": 9.0, "help": "time to use, about (default %(default)s)"},
            "--out": {"type": Path, "required": True, "help": "folder for gpu_check.json and gpu_check.md"},
        },
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.exit(2, "launch.gpu_check: error: torch sees no GPU here; nothing was measured\n")
    begin, device = time.monotonic(), torch.device("cuda", 0)
    result: dict[str, Any] = {
        "schema": "gpu-check/1",
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "minutes": options.minutes,
        "total_bytes": torch.cuda.get_device_properties(device).total_memory,
        "command": spelled("launch.gpu_check", argv),
        "missing": [name for name in _OPTIONAL if importlib.util.find_spec(name) is None],
        "memory": [],
        "training": [],
    }
    try:
        for part in _parts(result, lambda: options.minutes * 60 - (time.monotonic() - begin), device):
            write_result(options.out, "gpu_check", result, to_markdown(result))
            say(f"{time.monotonic() - begin:6.0f} s  {part}")
    except KeyboardInterrupt:
        say("stopped; what was measured is written")
    finally:
        write_result(options.out, "gpu_check", result, to_markdown(result))
    print(to_markdown(result))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
