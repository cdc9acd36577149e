"""`python -m toolkit.memory.predict`: what training a model will take of a GPU, row by row, before one is touched.

Forward and backward are tracked on fake tensors, optimizer state, masks, averages and buckets follow by arithmetic. The
figure is what torch's allocator has given out at its peak in forward and backward; the copies that torch's own
optimizers make in their update are left out (they decide only where the batch is very small), cache and context come on
top (see `fits`). The rows under
--zero and --fsdp are arithmetic that was not compared with a measurement.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["main", "predict"]

# Reserved over allocated in replays of torch's allocator (12 to 19 %), and a GPU context.
RESERVED_OVER_ALLOCATED = 1.18
CONTEXT_BYTES = 512 * 2**20
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Question:
    """What is to be trained, and how."""

    model: str
    opt: str = "adamw"
    pruning: str | None = None
    score: str | None = None
    sparsity: float = 0.0
    amp: str | None = None
    img_size: int | None = None
    num_classes: int = 1000
    ranks: int = 1
    zero: int = 0
    fsdp: bool = False
    ema: bool = False
    grad_checkpointing: bool = False
    channels_last: bool = False
    fused_backward: bool = False
    model_options: Mapping[str, Any] = field(default_factory=dict)


class Prediction:
    """The ledger of a question at any batch size; tracking is done once."""

    def __init__(self, question: Question, log: Callable[[str], None]) -> None:
        import timm
        import torch
        from timm.data import resolve_data_config

        from toolkit.memory.activations import track_step
        from toolkit.optim.registry import find_spec, resolve_name
        from toolkit.prune.groups import prunable_names

        self.question = question
        self.opt, self.method = resolve_name(question.opt, question.pruning)
        self.spec = find_spec(self.opt)
        if self.spec is None:
            raise ValueError(
                f"--opt {question.opt}: only the state of our optimizers and timm's sgd, momentum, adam and adamw is "
                "known; python -m toolkit.optim --list shows them"
            )
        if not timm.is_model(question.model):
            raise ValueError(f"--model {question.model} is not a timm model")

        def make_model() -> torch.nn.Module:
            model = timm.create_model(question.model, num_classes=question.num_classes, **question.model_options)
            if question.img_size and hasattr(model, "set_input_size"):
                resize: Any = model.set_input_size
                resize(img_size=question.img_size)
            if question.grad_checkpointing:
                checkpointing: Any = model.set_grad_checkpointing
                checkpointing(True)
            return model

        model = make_model()
        size = tuple(resolve_data_config({}, model=model)["input_size"])
        if question.img_size:
            size = (size[0], question.img_size, question.img_size)
        self.input_size = size
        prunable = prunable_names(model)
        self.parameters = [(p.numel(), p.itemsize, name in prunable) for name, p in model.named_parameters()]
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
        self.buffer_bytes = sum(b.nbytes for b in model.buffers())
        amp_dtype = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[question.amp]
        self.step = track_step(
            make_model,
            size,
            question.num_classes,
            amp_dtype=amp_dtype,
            channels_last=question.channels_last,
            frees_gradients=question.fused_backward,
            on_progress=log,
        )

    def _optimizer_rows(self, sparsity: float | None) -> dict[str, int]:
        """State of the optimizer before masks exist (None), or at a sparsity."""
        from toolkit.memory.arithmetic import ParameterFacts, predict_optimizer_rows

        assert self.spec is not None
        prunable = sum(numel for numel, _, may in self.parameters if may)
        left = math.floor((sparsity or 0.0) * prunable)  # zeros to hand out; only their sum matters
        facts = []
        for numel, itemsize, may in self.parameters:
            zeros = min(left, numel) if may else 0
            left -= zeros
            facts.append(ParameterFacts(numel, may, numel - zeros, itemsize))
        method = self.method
        if sparsity is None and method in ("state", "magnitude"):
            method = "none"  # dense until the first mask; movement's scores are there from the first step
        rows = predict_optimizer_rows(
            facts, self.spec.moments, counts_steps=self.spec.counts_steps, method=method, score=self.question.score
        )
        return rows if sparsity is not None else {key: size for key, size in rows.items() if key != "masks"}

    def ledger(self, batch_size: int, sparsity: float | None) -> dict[str, int]:
        """Bytes by row at the peak of a step."""
        question, step = self.question, self.step.peak(batch_size)
        optimizer = self._optimizer_rows(sparsity)
        weights, gradients, buckets, flat = self.weight_bytes, step.pop("gradients"), 0, 0
        if question.ranks > 1 and not question.zero and not question.fsdp:
            gradients, buckets = 0, self.weight_bytes  # gradients are views of DDP's buckets, there from the start
        share = question.ranks
        if question.fsdp or question.zero:
            optimizer = {key: -(-size // share) for key, size in optimizer.items()}
        if question.zero:
            flat = -(-self.weight_bytes // share)  # DeepSpeed's float32 copy of this rank's slice
        if question.fsdp or question.zero == 3:
            weights = -(-weights // share)
        rows = {
            "weights": weights,
            "buffers": self.buffer_bytes,
            "gradients": gradients,
            **optimizer,
            "ddp_buckets": buckets,
            "flat_copies": flat,
            "ema": self.weight_bytes + self.buffer_bytes if question.ema else 0,
            **step,
        }
        return {row: size for row, size in rows.items() if size}

    def peaks(self, batch_size: int) -> dict[str, int]:
        """Peak allocated bytes in the dense phase and at final sparsity."""
        final = self.question.sparsity if self.method != "none" else None
        return {
            "dense": sum(self.ledger(batch_size, None).values()),
            "final": sum(self.ledger(batch_size, final).values()),
        }

    def needed_bytes(self, batch_size: int) -> int:
        """What a GPU should have: the higher peak with the allocator's usual cache, and a context."""
        return round(max(self.peaks(batch_size).values()) * RESERVED_OVER_ALLOCATED) + CONTEXT_BYTES

    def largest_batch(self, limit_bytes: int) -> int:
        """The largest batch size whose `needed_bytes` stay within the limit; 0 where none does."""
        low, high = 0, 1
        while self.needed_bytes(high) <= limit_bytes:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.needed_bytes(middle) <= limit_bytes else (low, middle)
        return low


def parse_bytes(text: str) -> int:
    """`48GiB`, `46.5 GB`, `1024MiB` -> bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?I?B?)\s*", text.upper())
    if match is None or (match.group(2) not in _UNITS and match.group(2) != "B"):
        raise ValueError(f"{text!r} is not a size; write it like 48GiB")
    return int(float(match.group(1)) * _UNITS.get(match.group(2), 1))


def predict(
    question: Question,
    batch_size: int,
    *,
    limit_bytes: int | None = None,
    max_bytes: int | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The prediction as one JSON object: peaks, both ledgers, and what `--fits` and `--max-batch-size` ask."""
    prediction = Prediction(question, log)
    final = question.sparsity if prediction.method != "none" else None
    result: dict[str, Any] = {
        "schema": "memory-prediction/1",
        "unit": "bytes",
        "model": question.model,
        "opt": prediction.opt,
        "pruning": prediction.method,
        "sparsity": question.sparsity,
        "batch_size": batch_size,
        "input_size": list(prediction.input_size),
        "amp": question.amp,
        "ranks": question.ranks,
        "zero": question.zero,
        "fsdp": question.fsdp,
        "peak_allocated_bytes": prediction.peaks(batch_size),
        "ledger": {"dense": prediction.ledger(batch_size, None), "final": prediction.ledger(batch_size, final)},
        "needed_bytes": prediction.needed_bytes(batch_size),
    }
    if limit_bytes is not None:
        result["fits"] = {"limit_bytes": limit_bytes, "fits": result["needed_bytes"] <= limit_bytes}
    if max_bytes is not None:
        result["max_batch_size"] = {"limit_bytes": max_bytes, "batch_size": prediction.largest_batch(max_bytes)}
    return result


def to_text(result: dict[str, Any]) -> str:
    """The prediction as a table in MiB."""
    mib = 2**20
    dense, final = result["ledger"]["dense"], result["ledger"]["final"]
    lines = [
        f"{result['model']}, batch {result['batch_size']} a rank, {'x'.join(map(str, result['input_size']))}, "
        f"{result['amp'] or 'float32'}, {result['opt']}, sparsity {result['sparsity']:g}: peak allocated, MiB",
        "",
        f"{'':18}{'dense phase':>14}{'final sparsity':>16}",
    ]
    for row in dict.fromkeys([*dense, *final]):
        lines.append(f"{row:18}{dense.get(row, 0) / mib:14,.1f}{final.get(row, 0) / mib:16,.1f}")
    peaks = result["peak_allocated_bytes"]
    lines.append(f"{'peak allocated':18}{peaks['dense'] / mib:14,.1f}{peaks['final'] / mib:16,.1f}")
    lines += [
        "",
        f"A GPU should have about {result['needed_bytes'] / mib:,.0f} MiB: the higher peak × {RESERVED_OVER_ALLOCATED} "
        f"for the allocator's cache, and {CONTEXT_BYTES // mib} MiB of context (rules of thumb).",
    ]
    if "fits" in result:
        limit, fits = result["fits"]["limit_bytes"], result["fits"]["fits"]
        lines.append(f"{limit / 2**30:g} GiB: {'it fits' if fits else 'it does not fit'}.")
    if "max_batch_size" in result:
        found = result["max_batch_size"]
        lines.append(f"Largest batch in {found['limit_bytes'] / 2**30:g} GiB: {found['batch_size']} a rank.")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m toolkit.memory.predict", description=__doc__)
    parser.add_argument("--model", default="resnet50", help="any timm model (default %(default)s)")
    parser.add_argument("-b", "--batch-size", type=int, default=128, help="images a rank (default %(default)s)")
    parser.add_argument("--opt", default="adamw", help="default %(default)s")
    parser.add_argument("--pruning", choices=("none", "magnitude", "movement", "state"), default=None)
    parser.add_argument("--prune-score", default=None, help="displacement, for movement")
    parser.add_argument("--sparsity", type=float, default=0.0, help="final sparsity (default %(default)s)")
    parser.add_argument("--amp", choices=("bf16", "fp16"), default=None, help="mixed precision")
    parser.add_argument("--img-size", type=int, default=None, help="side in pixels; the model's own by default")
    parser.add_argument("--num-classes", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--ranks", type=int, default=1, help="default %(default)s")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=0, help="DeepSpeed stage")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2")
    parser.add_argument("--model-ema", action="store_true", help="a running average of the weights")
    parser.add_argument("--grad-checkpointing", action="store_true", help="timm's activation checkpointing")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--fused-backward", action="store_true", help="each gradient freed as it is used")
    parser.add_argument("--fits", metavar="SIZE", help="does it fit this much memory, for example 48GiB?")
    parser.add_argument("--max-batch-size", metavar="SIZE", help="the largest batch size in this much memory")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line on stdout")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and predict."""
    parser = _parser()
    options = parser.parse_args(argv)
    question = Question(
        options.model,
        options.opt,
        options.pruning,
        options.prune_score,
        options.sparsity,
        options.amp,
        options.img_size,
        options.num_classes,
        options.ranks,
        options.zero,
        options.fsdp,
        options.model_ema,
        options.grad_checkpointing,
        options.channels_last,
        options.fused_backward,
    )
    try:
        if options.batch_size < 1 or options.ranks < 1:
            raise ValueError("--batch-size and --ranks must be at least 1")
        if not 0 <= options.sparsity < 1:
            raise ValueError(f"--sparsity {options.sparsity} must be in [0, 1)")
        limits = [parse_bytes(text) if text else None for text in (options.fits, options.max_batch_size)]
        result = predict(
            question,
            options.batch_size,
            limit_bytes=limits[0],
            max_bytes=limits[1],
            log=lambda text: print(text, file=sys.stderr, flush=True),  # noqa: T201
        )
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(json.dumps(result) if options.json else to_text(result))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
