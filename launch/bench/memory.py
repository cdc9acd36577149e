"""Each way to take less memory, with the ledger row it changes before and after, from a probed training step.

Bytes of tensors are the same on any device, so this runs on CPU; what only a GPU's allocator has stays empty there.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import nn

import toolkit.optim  # noqa: F401  its names in timm's factory
from toolkit.builder.recompute import checkpoint_activations
from toolkit.command import say
from toolkit.engine.engines.fused import FusedBackward
from toolkit.markdown import mib, page, table
from toolkit.memory.activations import StorageTracker
from toolkit.memory.ledger import Owners, count_bytes, find_owners
from toolkit.memory.probe import StepProbe

_STEPS = 4  # the fourth is probed: DDP makes its buckets anew in the second


@dataclass(frozen=True)
class _Case:
    """A training step to probe."""

    opt: str = "adamw"
    sparsity: float = 0.0
    checkpointing: bool = False
    fused: bool = False
    ddp: str = ""  # "copy": DDP's default, "view": gradient_as_bucket_view
    state_dtype: str = ""


# Saving -> (before, after, rows in which it shows, where).
_SAVINGS: dict[str, tuple[_Case, _Case, tuple[str, ...]]] = {
    "`--opt adamwprune --sparsity 0.7`": (_Case(), _Case("adamwprune", 0.7), ("optim.exp_avg", "optim.exp_avg_sq")),
    "`--opt sgdprune --sparsity 0.7`": (_Case("sgd"), _Case("sgdprune", 0.7), ("optim.momentum_buffer",)),
    "`--opt-kwargs state_dtype=bfloat16`": (
        _Case("adamwprune", 0.7),
        _Case("adamwprune", 0.7, state_dtype="bfloat16"),
        ("optim.exp_avg", "optim.exp_avg_sq"),
    ),
    "`--grad-checkpointing`": (_Case(), _Case(checkpointing=True), ("activations",)),
    "`--fused-backward`": (_Case(), _Case(fused=True), ("gradients",)),
    "`gradient_as_bucket_view` (always on)": (_Case(ddp="copy"), _Case(ddp="view"), ("gradients", "ddp_buckets")),
}


@functools.cache
def _probed(model_name: str, case: _Case, batch_size: int, size: int) -> dict[str, dict[str, int]]:
    """Rows at the peak of a step, and between steps."""
    say(f"probing {case}")
    torch.manual_seed(0)
    model = timm.create_model(model_name).train()
    if case.checkpointing:
        checkpoint_activations(model, model_name)
    options: dict[str, Any] = {"state_dtype": case.state_dtype} if case.state_dtype else {}
    if case.sparsity:
        options |= {"sparsity": case.sparsity, "begin_step": 0, "end_step": 2, "frequency": 1}
    optimizer = create_optimizer_v2(model, case.opt, lr=1e-3, weight_decay=1e-2, **options)
    fused = FusedBackward(optimizer) if case.fused else None
    forward: nn.Module = model
    if case.ddp:
        forward = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=case.ddp == "view")

    def step(number: int, probe: StepProbe | None = None) -> None:
        optimizer.zero_grad()
        images, labels = torch.randn(batch_size, 3, size, size), torch.zeros(batch_size, dtype=torch.int64)
        loss = nn.functional.cross_entropy(forward(images), labels)
        if probe is not None:
            probe.name("input", images, labels)
            probe.forward_done()
        if fused is None or not fused.backward(number, loss.backward, probe):
            if fused is None:
                loss.backward()
            optimizer.step()

    def owners() -> Owners:
        return find_owners(model, optimizer.state, in_buckets=case.ddp == "view")

    tracker = _train_until_buckets_stand(step, owners)
    with StepProbe(owners) as probe:
        step(_STEPS, probe)
    between = count_bytes(owners())
    if case.ddp == "copy":  # what the second step made that is still there and nobody owns
        owned = {id(tracker.of(tensor)) for tensor in itertools.chain(*owners().values())}
        left = [one for one in tracker.lifetimes if one.died is None and id(one) not in owned]
        between["ddp_buckets"] = sum(one.size_bytes for one in left)
        probe.rows["ddp_buckets"] = between["ddp_buckets"]  # made before the probed step, out of its sight
    return {
        "peak": {row: size for row, size in probe.rows.items() if size},
        "between": {row: size for row, size in between.items() if size},
    }


def _train_until_buckets_stand(step: Callable[[int], None], owners: Callable[[], Owners]) -> StorageTracker:
    """The steps before the probed one; what the tracker saw of the second, in which DDP makes its buckets anew."""
    tracker = StorageTracker()
    step(1)
    for tensor in itertools.chain(*owners().values()):
        tracker.stands(tensor)
    with tracker:
        step(2)
    for number in range(3, _STEPS):
        step(number)
    return tracker


def bench_memory(model_name: str, batch_size: int, size: int = 224) -> dict[str, Any]:
    """Probe every case once. Byte counts do not vary, so there are no rounds."""
    if not dist.is_initialized():  # one rank has the buckets that many have
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    savings = [
        {
            "saving": name,
            "rows": list(rows),
            "before": _probed(model_name, before, batch_size, size),
            "after": _probed(model_name, after, batch_size, size),
        }
        for name, (before, after, rows) in _SAVINGS.items()
    ]
    dist.destroy_process_group()
    return {
        "schema": "bench-memory/1",
        "model": model_name,
        "batch_size": batch_size,
        "size": size,
        "device": "cpu",
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "savings": savings,
        "cache_released_bytes": None,  # the allocator's, after the last mask update: needs a GPU
    }


def _cells(entry: dict[str, Any], where: str) -> list[str]:
    sides = [entry[key][where] for key in ("before", "after")]
    rows = [sum(side.get(row, 0) for row in entry["rows"]) for side in sides]
    return [mib(size, 1) for size in (*rows, *(sum(side.values()) for side in sides))]


def to_markdown(result: dict[str, Any], command: str) -> str:
    """One line a saving, at the peak of a step and between steps."""
    lines = [
        f"# Less memory: {result['model']}, batch {result['batch_size']}, {result['size']} px, float32",
        "",
        f"Made by `{command}` (torch {result['versions']['torch']}, timm {result['versions']['timm']}). Bytes of "
        "tensors, counted on CPU storage by storage; they are the same on a GPU. AdamW unless the line says otherwise.",
    ]
    header = ["saving", "rows", "rows before", "rows after", "all tensors before", "after"]
    for where, title in (("between", "Between steps"), ("peak", "At the peak of a step")):
        rows = [[one["saving"], ", ".join(one["rows"]), *_cells(one, where)] for one in result["savings"]]
        rows.append(["cache released after the last mask update", "allocator cache", *[""] * 4])
        lines += ["", f"## {title}, MiB", "", *table(header, rows, text=(0, 1))]
    return page(*lines, "", "The last line needs a GPU's allocator and stays empty here.")
