"""What training will take of a GPU, row by row, before one is touched, and the batch that fits.

Forward and backward are tracked on fake tensors, optimizer state, masks, averages and buckets follow by arithmetic. The
figure is what torch's allocator has given out at its peak in forward and backward; the copies that torch's own
optimizers make in their update are left out (they decide only where the batch is very small), cache and context come on
top (see `needed_bytes`). The peaks of FSDP2 and ZeRO are arithmetic that was not compared with a measurement.
"""

import bisect
import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from toolkit.builder.data import DataSet, batch_size_per_rank, input_settings
from toolkit.builder.distill import teacher_bytes
from toolkit.builder.ledger_rows import rows_between_steps, rows_of_engine
from toolkit.builder.model import amp_dtype, create_model, train_loss
from toolkit.builder.optimizer import final_sparsity, own_rules, resolve_optimizer, with_state_budget
from toolkit.builder.recompute import checkpoint_activations
from toolkit.config import Config
from toolkit.engine.engines.ddp import Engine
from toolkit.errors import refuse
from toolkit.log import get_logger
from toolkit.markdown import MIB
from toolkit.memory.activations import track_step
from toolkit.memory.arithmetic import ParameterFacts
from toolkit.memory.ledger import is_optimizer_row
from toolkit.optim.registry import find_spec
from toolkit.prune.options import PruningOptions
from toolkit.prune.rules import own_options
from toolkit.prune.start import start_quotas

RESERVED_OVER_ALLOCATED = 1.18  # in replays of torch's allocator 12 to 19 %
CONTEXT_BYTES = 512 * 2**20  # of a GPU
NUM_CLASSES = 1000  # ImageNet's, where nothing says how many
_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Prediction:
    """The ledger of a run at any batch size per rank; tracking is done once.

    `engine` is ddp (also for one rank), fsdp2 or zero1 to zero3. `num_classes` counts where --num-classes is not given.
    Raises ValueError for a model or optimizer that is not known.
    """

    def __init__(
        self,
        config: Config,
        num_classes: int = NUM_CLASSES,
        num_ranks: int = 1,
        engine: str = "ddp",
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        config = dataclasses.replace(config, pretrained=False, initial_checkpoint="")  # sizes only
        self.num_ranks, self.engine, num_classes = num_ranks, engine, config.num_classes or num_classes
        self._take_optimizer(config)

        def make_model() -> nn.Module:
            model = create_model(config, num_classes)
            if config.grad_checkpointing:
                checkpoint_activations(model, config.model)
            return model

        model = make_model()
        self.input_size = tuple(input_settings(config, model)["input_size"])
        own, named = own_rules(model, config), list(model.named_parameters())
        self.shapes = [tuple(p.shape) for _, p in named]
        self.parameters = [
            ParameterFacts(p.numel(), name in own, p.numel(), p.itemsize, p.requires_grad) for name, p in named
        ]
        self.own: list[Any] = [
            tuple(sorted(own[name].items())) if name in own and p.requires_grad else None for name, p in named
        ]
        self.buffers_bytes = sum(b.nbytes for b in model.buffers())
        self.teacher_bytes = teacher_bytes(config, num_classes)
        self.step = track_step(
            make_model,
            self.input_size,
            num_classes,
            amp_dtype=amp_dtype(config),
            channels_last=config.channels_last,
            frees_gradients=config.fused_backward,
            loss=train_loss(config),
            soft_targets=config.mixes,
            on_progress=log,
        )

    def _take_optimizer(self, config: Config) -> None:
        self.opt, self.method = resolve_optimizer(config)
        self.config = with_state_budget(config)
        self.spec = find_spec(self.opt)
        if self.spec is None:
            raise ValueError(
                f"--opt {config.opt}: only the state of our optimizers and timm's sgd, momentum, adam and adamw is "
                "known; python -m toolkit.optim --list shows them"
            )

    def with_optimizer(self, config: Config) -> "Prediction":
        """The same model under another optimizer or pruning: what was tracked is used again."""
        other = copy.copy(self)
        other._take_optimizer(dataclasses.replace(config, pretrained=False, initial_checkpoint=""))
        return other

    def _parameters_at(self, sparsity: float) -> list[ParameterFacts]:
        pairs, whole = list(zip(self.parameters, self.own, strict=True)), PruningOptions(sparsity=sparsity, end_step=1)
        sizes = {own: sum(one.numel for one, other in pairs if other == own) for own in self.own if own is not None}
        left = {own: own_options(whole, dict(own)).num_zeros_at(1, size) for own, size in sizes.items() if sparsity}
        facts = []
        for one, own in pairs:  # zeros to hand out; only their sum matters
            left[own] = left.get(own, 0) - (zeros := min(left.get(own, 0), one.numel))
            facts.append(dataclasses.replace(one, survivors=one.numel - zeros))
        return facts

    def _parameters_at_start(self) -> list[ParameterFacts]:
        facts = list(self.parameters)
        for own in set(self.own) - {None}:
            numbers = [number for number, other in enumerate(self.own) if other == own]
            quotas = start_quotas([self.shapes[number] for number in numbers], self.config.prune_start)
            for number, zeros in zip(numbers, quotas, strict=True):
                facts[number] = dataclasses.replace(facts[number], survivors=facts[number].numel - zeros)
        return facts

    def ledger(self, batch_size: int, sparsity: float | None) -> dict[str, int]:
        """Bytes by row at the peak of a step: before the ramp (None), or at a sparsity."""
        method, sharded = self.method, self.engine != "ddp"
        sparse_start = sparsity is None and method != "none" and self.config.prune_start > 0
        dense = sparsity is None and not sparse_start
        if dense and method in ("state", "magnitude"):
            method = "none"  # dense until the first mask; movement's scores are there from the first step
        facts = self._parameters_at_start() if sparse_start else self._parameters_at(sparsity or 0.0)
        num_ranks = 1 if sharded else self.num_ranks
        rows = rows_between_steps(self.config, self.spec, method, facts, self.buffers_bytes, num_ranks)
        if dense:
            rows.pop("masks", None)
        step = self.step.peak(batch_size)
        step["activations"] += 12  # the loss summed over micro-batches, and the two flags that travel during backward
        step["workspace"] += 8 if self.config.mixed_precision == "fp16" else 4  # the loss as it is divided, and scaled
        if num_ranks > 1:
            step["gradients"] = 0  # DDP's buckets have them
        if sharded:
            rows |= self._shares(rows)
        rows["teacher"] = self.teacher_bytes
        return {row: size for row, size in (rows | step).items() if size}

    def _shares(self, rows: dict[str, int]) -> dict[str, int]:
        """What a rank of a sharded engine holds instead."""
        split = {row: -(-size // self.num_ranks) for row, size in rows.items() if is_optimizer_row(row)}
        weights = -(-rows["weights"] // self.num_ranks)
        if self.engine.startswith("zero"):
            split["flat_copies"] = weights  # DeepSpeed's float32 copy of this rank's slice
        return split | ({"weights": weights} if self.engine in ("fsdp2", "zero3") else {})

    def ledgers(self, batch_size: int) -> dict[str, dict[str, int]]:
        """The ledger at the peak in the dense phase and at final sparsity."""
        final = None if self.method == "none" else final_sparsity(self.config, self.method)
        return {"dense": self.ledger(batch_size, None), "final": self.ledger(batch_size, final)}

    def peaks(self, batch_size: int) -> dict[str, int]:
        """Peak allocated bytes in the dense phase and at final sparsity."""
        return {phase: sum(rows.values()) for phase, rows in self.ledgers(batch_size).items()}

    def needed_bytes(self, batch_size: int) -> int:
        """What a GPU should have: the higher peak with the allocator's usual cache, and a context."""
        return round(max(self.peaks(batch_size).values()) * RESERVED_OVER_ALLOCATED) + CONTEXT_BYTES

    def largest_batch(self, limit_bytes: int) -> int:
        """The largest batch size whose `needed_bytes` stay within the limit; 0 where none does."""
        too_large = 1
        while self.needed_bytes(too_large) <= limit_bytes:
            too_large *= 2
        return bisect.bisect_right(range(1, too_large), limit_bytes, key=self.needed_bytes)


def predict_run(
    config: Config, engine: Engine, num_classes: int, num_ranks: int
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Ledger rows of this rank between steps of a run as it stands, and those of a step's peaks, dense and final.

    The rows are empty, and the reason logged, where an engine offloads. The peaks are empty for FSDP2 and ZeRO, whose
    steps are not tracked, and, logged, where they cannot be; the final one is left out with --prune-shrink: nobody
    knows which channels go.
    """
    if engine.name != "ddp" and engine.offloads:
        get_logger().warning("the memory ledger is not predicted: %s keeps a part on the host", engine.name)
        return {}, {}
    opt, method = resolve_optimizer(config)
    rows = rows_of_engine(config, find_spec(opt), method, engine, num_ranks)
    rows |= {"teacher": held} if (held := teacher_bytes(config, num_classes)) else {}
    if engine.name != "ddp":
        return rows, {}
    try:
        # Making a model draws its initial weights; a run's generator must not move for a report.
        with torch.random.fork_rng(devices=[]):
            peaks = Prediction(config, num_classes, num_ranks).ledgers(batch_size_per_rank(config, num_ranks))
    except (ValueError, RuntimeError, TypeError) as error:
        get_logger().warning("the step's memory is not predicted: %s", str(error).splitlines()[0] or repr(error))
        return rows, {}
    return rows, {phase: ledger for phase, ledger in peaks.items() if phase == "dense" or not config.prune_shrink}


def parse_bytes(text: str) -> int:
    """`48GiB`, `46.5 GB`, `1024MiB` -> bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?I?B?)\s*", text.upper())
    if match is None or match.group(2) not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it like 48GiB")
    return int(float(match.group(1)) * _UNITS[match.group(2)])


def with_automatic_batch_size(config: Config, data: DataSet, num_ranks: int) -> Config:
    """`config` with the batch size that --auto-batch-size asks for, or as it is without that flag."""
    if not config.auto_batch_size:
        return config
    if config.global_batch_size is not None:
        raise ValueError("--auto-batch-size and --global-batch-size both set the batch; leave one out")
    limit_bytes = parse_bytes(config.auto_batch_size)
    prediction = Prediction(config, data.num_classes, num_ranks)
    most = len(data.train) // (num_ranks * config.grad_accum_steps)
    found = min(prediction.largest_batch(limit_bytes), most)
    if config.mixes:
        found -= found % 2  # mixup and CutMix pair images
    if found < 1:
        raise ValueError(
            f"--auto-batch-size {config.auto_batch_size}: one image needs {prediction.needed_bytes(1) / MIB:,.0f} "
            "MiB; use --amp, --grad-checkpointing or a smaller model"
        )
    get_logger().info(
        "--auto-batch-size %s: %d images per rank, predicted to need %.0f MiB%s",
        config.auto_batch_size,
        found,
        prediction.needed_bytes(found) / MIB,
        " (all the data there is)" if found == most else "",
    )
    return dataclasses.replace(config, batch_size=found)


def confirm_batch_size(model: nn.Module, config: Config, size: tuple[int, ...], device: torch.device) -> None:
    """Forward and backward once at the batch size found, on a GPU; leaves weights, buffers, generators as they were."""
    if not config.auto_batch_size or device.type != "cuda":
        return
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    amp, weight = amp_dtype(config), next(model.parameters())
    try:
        with torch.random.fork_rng([device]), torch.autocast("cuda", dtype=amp, enabled=amp is not None):
            model.train()(weight.new_zeros(config.batch_size, *size)).float().sum().backward()
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"a step with the predicted {config.batch_size} images per rank does not fit this GPU "
            f"({str(error).splitlines()[0]}); give --auto-batch-size less"
        ) from None
    finally:
        model.zero_grad(set_to_none=True)
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        torch.cuda.empty_cache()


def predict(
    config: Config,
    num_ranks: int = 1,
    engine: str = "ddp",
    *,
    limit_bytes: int | None = None,
    max_bytes: int | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The prediction as one JSON object: peaks, both ledgers, and what `--fits` and `--max-batch-size` ask."""
    refuse(
        {
            f"--ranks {num_ranks} must be at least 1": num_ranks < 1,
            "--auto-batch-size is answered by --max-batch-size here; give that": config.auto_batch_size,
        }
    )
    batch_size = batch_size_per_rank(config, num_ranks)
    prediction = Prediction(config, num_ranks=num_ranks, engine=engine, log=log)
    result: dict[str, Any] = {
        "schema": "memory-prediction/1",
        "unit": "bytes",
        "model": config.model,
        "opt": prediction.opt,
        "pruning": prediction.method,
        "sparsity": config.sparsity or 0.0,
        "batch_size": batch_size,
        "input_size": list(prediction.input_size),
        "amp": None if config.mixed_precision == "no" else config.mixed_precision,
        "ranks": num_ranks,
        "zero": int(engine[4:]) if engine.startswith("zero") else 0,
        "fsdp": engine == "fsdp2",
        "peak_allocated_bytes": prediction.peaks(batch_size),
        "ledger": prediction.ledgers(batch_size),
        "needed_bytes": prediction.needed_bytes(batch_size),
    }
    if limit_bytes is not None:
        result["fits"] = {"limit_bytes": limit_bytes, "fits": result["needed_bytes"] <= limit_bytes}
    if max_bytes is not None:
        result["max_batch_size"] = {"limit_bytes": max_bytes, "batch_size": prediction.largest_batch(max_bytes)}
    return result


def to_text(result: dict[str, Any]) -> str:
    """The prediction as a table in MiB."""
    dense, final = result["ledger"]["dense"], result["ledger"]["final"]
    rows = {row: (dense.get(row, 0), final.get(row, 0)) for row in [*dense, *final]}
    rows["peak allocated"] = tuple(result["peak_allocated_bytes"][phase] for phase in ("dense", "final"))
    width = max(map(len, rows))
    lines = [
        f"{result['model']}, batch {result['batch_size']} a rank, {'x'.join(map(str, result['input_size']))}, "
        f"{result['amp'] or 'float32'}, {result['opt']}, sparsity {result['sparsity']:g}: peak allocated, MiB",
        "",
        f"{'':{width}}{'dense phase':>14}{'final sparsity':>16}",
    ]
    lines += [f"{row:{width}}{first / MIB:14,.1f}{last / MIB:16,.1f}" for row, (first, last) in rows.items()]
    lines += [
        "",
        f"A GPU should have about {result['needed_bytes'] / MIB:,.0f} MiB: the higher peak × {RESERVED_OVER_ALLOCATED} "
        f"for the allocator's cache, and {CONTEXT_BYTES // MIB} MiB of context (rules of thumb).",
    ]
    if "fits" in result:
        limit, fits = result["fits"]["limit_bytes"], result["fits"]["fits"]
        lines.append(f"{limit / 2**30:g} GiB: {'it fits' if fits else 'it does not fit'}.")
    if "max_batch_size" in result:
        found = result["max_batch_size"]
        lines.append(f"Largest batch in {found['limit_bytes'] / 2**30:g} GiB: {found['batch_size']} a rank.")
    return "\n".join(lines)
