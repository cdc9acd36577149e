"""One optimizer step: micro-batches, backward, the check that the loss is finite, clipping, update."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from timm.models import model_parameters
from timm.utils import dispatch_clip_grad
from torch import Tensor

from toolkit.data.loader import Batch
from toolkit.dist import World
from toolkit.engine.run import Run
from toolkit.memory.probe import StepProbe

__all__ = ["NonFiniteLossError", "StepResult", "train_step"]


class NonFiniteLossError(Exception):
    """A rank's loss is not finite; no rank made the update."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves: mean loss of this rank's images (on the device), gradient norm before clipping where it was
    taken, images read and unreadable on this rank, seconds waited for data, and whether a rank was asked to stop.
    """

    loss: Tensor
    grad_norm: Tensor | None
    num_bad: int
    wait_s: float
    stop: bool


class _Signal:
    """One small collective a step: which rank's loss is not finite, and whether any rank was asked to stop.

    The flag is made and reduced on the device before backward and copied without blocking; the host reads it when
    backward has been launched, so a GPU is never idle for it, and before the update, so a bad one never happens. On CPU
    it travels during backward: waiting there for the slowest rank would be a second wait a step.
    """

    def __init__(self, loss: Tensor, stop: bool, world: World) -> None:
        bad = torch.where(loss.isfinite(), 0.0, float(world.num_ranks - world.rank))
        flags = torch.stack([bad, torch.full_like(bad, float(stop))])
        self._travelling = world.begin_max(flags) if not flags.is_cuda else None
        self._copy = world.max(flags).to("cpu", non_blocking=True) if flags.is_cuda else flags
        self._ready = torch.cuda.Event() if flags.is_cuda else None
        if self._ready is not None:
            self._ready.record()

    def read(self, world: World) -> tuple[int | None, bool]:
        """(lowest rank whose loss is not finite, or None; whether to stop)."""
        if self._ready is not None:
            self._ready.synchronize()
        if self._travelling is not None:
            self._travelling.wait()
        bad, stop = self._copy.tolist()
        return (world.num_ranks - int(bad) if bad else None), bool(stop)


def train_step(
    run: Run,
    batches: Iterator[Batch],
    update: int,
    epoch: int,
    *,
    stop: bool,
    want_grad_norm: bool,
    probe: StepProbe | None = None,
) -> StepResult:
    """Make update number `update` (from 1). Raises NonFiniteLossError on all ranks, before anything has changed.

    A `probe` is told what the batch is and where backward begins.
    """
    accumulation = run.plan.accumulation
    updates_inside = run.fused is not None or run.sharding.updates_in_backward
    run.optimizer.zero_grad()  # here, not after the step: between steps the memory ledger reads the gradients
    total = torch.zeros((), device=run.world.device)
    num_bad, wait_s = 0, 0.0
    signal: _Signal | None = None
    for micro in range(accumulation):
        begin = time.perf_counter()
        batch = next(batches)
        wait_s += time.perf_counter() - begin
        num_bad += batch.num_bad
        if probe is not None:
            probe.leave_out(batch.images, batch.weights, batch.samples)  # they stay with the host
        images, targets = run.augment(*run.to_inputs(batch), (update - 1) * accumulation + micro, epoch)
        last = micro == accumulation - 1
        with contextlib.nullcontext() if last else run.accelerator.no_sync(run.model):
            with run.autocast():
                output = run.model(images)
            if output.dtype.itemsize < 4:  # with DDP Accelerate has done so; the loss is in float32 on every engine
                output = output.float()
            loss = run.train_loss(output, targets) / accumulation
            total += loss.detach()
            if last:
                signal = _Signal(total, stop, run.world)
                if updates_inside:  # after backward is too late to look at the loss
                    stop = _refuse_non_finite(signal, run.world, update)
            if probe is not None:
                probe.name("input", images, targets)
                probe.forward_done()
            if run.fused is None:
                run.sharding.backward(loss, last=last)
            elif run.fused.backward(update, partial(run.accelerator.backward, loss), probe):
                return StepResult(total, None, num_bad, wait_s, stop)
    if probe is not None:
        probe.backward_done()
    if run.sharding.updates_in_backward:
        return StepResult(total, run.sharding.grad_norm() if want_grad_norm else None, num_bad, wait_s, stop)
    assert signal is not None
    if not updates_inside:
        stop = _refuse_non_finite(signal, run.world, update)
    grad_norm = _clip(run, want_grad_norm)
    run.optimizer.step()
    return StepResult(total, grad_norm, num_bad, wait_s, stop)


def _refuse_non_finite(signal: _Signal, world: World, update: int) -> bool:
    """Raise NonFiniteLossError before anything has changed; returns whether any rank was asked to stop."""
    bad_rank, stop = signal.read(world)
    if bad_rank is not None:
        raise NonFiniteLossError(
            f"loss is not finite at step {update} on rank {bad_rank}; no rank made the update. Lower --lr, or add "
            "--clip-grad, and start anew"
        )
    return stop


def _clip(run: Run, want_norm: bool) -> Tensor | None:
    if not want_norm and run.plan.clip_grad is None:
        return None
    parameters = [parameter for parameter in run.bare_model.parameters() if parameter.grad is not None]
    if run.plan.clip_grad is not None and run.plan.clip_mode == "norm":
        return run.accelerator.clip_grad_norm_(parameters, run.plan.clip_grad)
    norm = None
    if want_norm or run.plan.clip_grad is not None:
        run.accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards, of which each rank has some
    if run.plan.clip_grad is not None:
        if run.plan.clip_mode == "agc":  # timm leaves the classifier out
            parameters = list(model_parameters(run.bare_model, exclude_head=True))
        dispatch_clip_grad(parameters, run.plan.clip_grad, mode=run.plan.clip_mode)
    return norm
