"""What goes between the ranks: counted as torch's profiler sees it, and as formulas of the number of ranks.

A payload is the bytes of the tensor one rank hands in. The formulas hold for float32 weights and the settings of the
files in accelerate_configs/; tests/distributed/test_collectives.py holds them against counted ones, byte for byte.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from toolkit.engine.masks import check_masks
from toolkit.engine.metrics import NUM_MEMORY_COLUMNS
from toolkit.engine.run import Run
from toolkit.engine.step import train_step

WHAT = ("gradients", "weights", "buffers", "control", "mask update")
_ITEMSIZE = {"float": 4, "double": 8, "long int": 8, "int": 4, "unsigned char": 1}
_BACKENDS = ("gloo:", "nccl:")
_FLOAT_BYTES, _COUNT_BYTES, _HISTOGRAMS_BYTES = 4, 8, 8 * (2049 + 2049 + 1025)
_CONTROL_BYTES = 64  # gradients and weights of a real model are larger


@dataclass(frozen=True)
class Traffic:
    """What the formulas need of a model: parameter shapes, elements of each optimizer group, prunable tensors, bytes
    of floating and counting buffers, and the shapes of weights that FSDP2 does not free after forward.
    """

    shapes: Sequence[tuple[int, ...]]
    groups: Sequence[int]
    prunable: int
    float_buffer_bytes: int
    int_buffer_bytes: int
    kept: Sequence[tuple[int, ...]] = ()

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(_FLOAT_BYTES * math.prod(shape) for shape in self.shapes)


def traffic_of(run: Run) -> Traffic:
    """The facts of a model that is not sharded, or of one under FSDP2. Call on all ranks, before the first step."""
    buffers = list(run.engine.module.buffers())
    return Traffic(
        [tuple(parameter.shape) for parameter in run.engine.module.parameters()],
        [sum(p.numel() for p in group["params"]) for group in run.engine.inner_optimizer.param_groups],
        len(run.prunable),
        sum(b.nbytes for b in buffers if b.is_floating_point()),
        sum(b.nbytes for b in buffers if not b.is_floating_point()),
        _kept_by_fsdp2(run.engine.model) if run.engine.name == "fsdp2" else (),
    )


def _kept_by_fsdp2(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes gathered once a step: those of units that do not free them after forward.

    torch decides so for the outermost unit in the first step, unless it was told otherwise (Accelerate 1.10 does).
    """
    from torch.distributed.fsdp import FSDPModule

    kept = []
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        group, keeps_by_default = state._fsdp_param_group, module is model and state._auto_reshard_after_forward
        if group is not None and (keeps_by_default or not group._reshard_after_forward):
            kept += [tuple(parameter._orig_size) for parameter in group.fsdp_params]
    return kept


def _rows_padded(shapes: Sequence[tuple[int, ...]], ranks: int) -> int:
    """Bytes of weights whose first dimension is split over the ranks, each share as large as the largest."""
    return sum(
        _FLOAT_BYTES * ranks * math.ceil((shape[0] if shape else 1) / ranks) * math.prod(shape[1:]) for shape in shapes
    )


def formulas(engine: str, facts: Traffic, ranks: int) -> dict[str, int]:
    """Payload bytes of one rank: of a step (gradients, weights, buffers, control) and of a mask update.

    Control is the 8 bytes that stop all ranks together where a loss is not finite, and what the engine adds. Gloo has
    no reduce-scatter: there, as counted here, FSDP2's gradients go by an all-reduce of the same payload.
    """
    scores = _COUNT_BYTES * facts.prunable
    selection = _HISTOGRAMS_BYTES + 2 * scores  # three histograms; tie counts and highest scores are gathered
    all_rows, kept = _rows_padded(facts.shapes, ranks), _rows_padded(facts.kept, ranks)
    slices = sum(_FLOAT_BYTES * math.ceil(size / (2 * ranks)) * 2 for size in facts.groups)
    share = sum(_FLOAT_BYTES * math.ceil(math.prod(shape) / ranks) for shape in facts.shapes)
    rows = {  # in the order of WHAT
        "ddp": (facts.weights_bytes, 0, facts.float_buffer_bytes + facts.int_buffer_bytes, 8, 16),
        "fsdp2": (all_rows, (2 * all_rows - kept) // ranks, 0, 8, selection + 3 * scores),
        "zero1": (facts.weights_bytes, slices, 0, 8 + 8, selection + scores + 16),
        "zero2": (facts.weights_bytes, slices, 0, 8 + 8, selection + scores + 16),
        "zero3": (share * ranks, share, 0, 8 + 16, selection + scores + 16),
    }
    return dict(zip(WHAT, rows[engine], strict=True))


def log_line_bytes(ranks: int) -> int:
    """Payload of the one all-reduce of a log line: loss, data wait and bad images, and every rank's memory figures."""
    return 8 * (3 + NUM_MEMORY_COLUMNS * ranks)


def wire_bytes(operation: str, payload_bytes: float, ranks: int) -> float:
    """Bytes a rank sends with the ring algorithm (Patarasuk and Yuan 2009): all-reduce, reduce-scatter, all-gather.

    A reduce-scatter's payload is the whole tensor, an all-gather's this rank's share.
    """
    share = (ranks - 1) / ranks
    return payload_bytes * {"all_reduce": 2 * share, "reduce_scatter": share, "all_gather": ranks - 1.0}[operation]


def count_collectives(work: Callable[[], Any]) -> list[tuple[str, int]]:
    """(operation, payload bytes) of every collective that `work` makes on this rank, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        work()
    results: Any = profile.profiler
    calls = [event for event in results.kineto_results.events() if event.name().startswith(_BACKENDS)]
    return [(call.name().split(":")[1], _payload(zip(call.shapes(), call.dtypes(), strict=True))) for call in calls]


def _payload(tensors: Iterable[tuple[Sequence[int], str]]) -> int:
    """Bytes of the tensors of these shapes and types; what is no tensor has another type."""
    return sum(math.prod(shape) * _ITEMSIZE[dtype] for shape, dtype in tensors if dtype in _ITEMSIZE)


def count_of_run(run: Run) -> dict[str, dict[str, int]]:
    """{what: {"bytes", "collectives"}} as counted. Call on all ranks of a fresh run that prunes.

    The first two steps pass uncounted: DDP puts its buckets together anew after the first.
    """
    due = next(update for update in range(4, run.plan.total_steps) if run.schedule.is_update_step(update))
    batches = itertools.chain.from_iterable(run.train_loader.epoch(0) for _ in itertools.repeat(None))

    def step(update: int) -> None:
        train_step(run, batches, update, 0, stop=False, want_grad_norm=False)
        if update == due:
            check_masks(run)

    step(1)
    step(2)
    ordinary = count_collectives(lambda: step(3))
    for update in range(4, due):
        step(update)
    both = count_collectives(lambda: step(due))
    rest = list((Counter(both) - Counter(ordinary)).elements())
    sizes: dict[str, list[int]] = {what: [] for what in WHAT}
    for operation, size in ordinary:
        sizes[_what(operation, size)].append(size)
    sizes["mask update"] = [size for _, size in rest]
    return {what: {"bytes": sum(mine), "collectives": len(mine)} for what, mine in sizes.items()}


def _what(operation: str, size: int) -> str:
    if operation == "broadcast":
        return "buffers"
    if operation == "all_reduce":
        return "gradients" if size > _CONTROL_BYTES else "control"
    return "weights"
