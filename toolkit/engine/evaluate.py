"""Evaluation in which every sample counts exactly once, whatever the number of ranks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from toolkit.engine.run import Run

_BETWEEN = 8  # batches from one call of `between` to the next


@dataclass(frozen=True)
class EvalResult:
    """Means over all evaluated samples: cross-entropy, top-1 and top-5 in percent; `num_bad` could not be read."""

    loss: float
    top1: float
    top5: float
    num_samples: int
    num_bad: int


@torch.no_grad()
def evaluate(run: Run, model: nn.Module, between: Callable[[], None] = lambda: None) -> EvalResult:
    """Evaluate `model`, not wrapped by DDP: its forward would broadcast buffers. Call on all ranks.

    `between` is called on all ranks after every eight batches, and may raise to end the evaluation.
    """
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=run.world.device)  # loss, top1, top5, samples, bad
    for number, batch in enumerate(run.eval_loader, 1):
        images, labels = run.to_inputs(batch)
        weights = batch.weights.to(run.world.device, torch.float64)
        with run.engine.autocast():
            logits = model(images)
        logits = logits.float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none").double()
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        sums[:4] += torch.stack(
            [(losses * weights).sum(), (ranked[:, 0] * weights).sum(), (ranked.any(1) * weights).sum(), weights.sum()]
        )
        sums[4] += batch.num_bad
        if number % _BETWEEN == 0:
            between()
    loss, top1, top5, count, bad = run.world.sum(sums).tolist()
    assert int(count + bad) == run.eval_loader.num_samples, (count, bad, run.eval_loader.num_samples)
    count = max(count, 1.0)
    return EvalResult(loss / count, 100 * top1 / count, 100 * top5 / count, int(count), int(bad))
