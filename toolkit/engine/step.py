"""One optimizer step: micro-batches, backward, the check that the loss is finite, update."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.data.loader import Batch
from toolkit.dist import World
from toolkit.engine.run import Run
from toolkit.errors import NonFiniteLossError
from toolkit.memory.probe import StepProbe


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


def _send_signal(loss: Tensor, stop: bool, world: World) -> Callable[[int], bool]:
    """One small collective a step: which rank's loss is not finite, and whether any rank was asked to stop.

    The flag is made and reduced on the device before backward and copied without blocking; the host reads it when
    backward has been launched, so a GPU is never idle for it, and before the update, so a bad one never happens. On CPU
    it travels during backward: waiting there for the slowest rank would be a second wait a step.

    Returns what reads it: given the update's number it raises NonFiniteLossError on all ranks if any one's loss is not
    finite, and returns whether to stop.
    """
    bad = torch.where(loss.isfinite(), 0.0, float(world.num_ranks - world.rank))
    flags = torch.stack([bad, torch.full_like(bad, float(stop))])
    if flags.is_cuda:
        flags, copied = world.max(flags).to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record()
        arrive: Callable[[], object] = copied.synchronize
    else:
        travelling = world.begin_max(flags)
        arrive = (lambda: None) if travelling is None else travelling.wait  # one rank has nothing to wait for

    def refuse_non_finite(update: int) -> bool:
        arrive()
        refused, asked = flags.tolist()
        if refused:
            raise NonFiniteLossError(
                f"loss is not finite at step {update} on rank {world.num_ranks - int(refused)}; no rank made the "
                "update. Lower --lr, or add --clip-grad, and start anew"
            )
        return bool(asked)

    return refuse_non_finite


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
    engine, accumulation = run.engine, run.plan.accumulation
    updates_in_backward = engine.updates_in_backward(update)
    engine.zero_grad()  # here, not after the step: between steps the memory ledger reads the gradients
    total = torch.zeros((), device=run.world.device)
    num_bad, wait_s = 0, 0.0
    for micro in range(accumulation):
        last = micro == accumulation - 1

        # Read: the loader's workers are ahead; what is waited for is what they could not keep up with.
        begin = time.perf_counter()
        batch = next(batches)
        wait_s += time.perf_counter() - begin
        num_bad += batch.num_bad
        images, targets = run.augment(*run.to_inputs(batch), (update - 1) * accumulation + micro, epoch)
        if probe is not None:  # they stay with the host
            probe.leave_out(*(one for one in batch if isinstance(one, Tensor) and one is not targets))

        # Forward: the loss is in float32 on every engine, and its mean over all micro-batches the step's.
        loss = run.train_loss(engine.forward(images, last=last), targets) / accumulation
        total += loss.detach()

        # Signal: it travels while backward computes, unless that makes the update, before which it must be read.
        if last:
            refuse_non_finite = _send_signal(total, stop, run.world)
            if updates_in_backward:
                stop = refuse_non_finite(update)

        # Backward
        if probe is not None:
            probe.name("input", images, targets)
            probe.forward_done()
        engine.backward(loss, update, last=last, probe=probe)

    # Refuse: on all ranks or none, and before any weight has changed.
    if probe is not None:
        probe.backward_done()
    if not updates_in_backward:
        stop = refuse_non_finite(update)

    # Update
    grad_norm = engine.update(update, want_grad_norm)
    return StepResult(total, grad_norm, num_bad, wait_s, stop)
