"""What `build` hands to the loop: the components of one run, built and placed, and nothing of the configuration."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from toolkit.data.loader import Batch, EvalLoader, TrainLoader
from toolkit.dist import World
from toolkit.engine.engines.ddp import Engine
from toolkit.memory.recorder import MemoryLog
from toolkit.prune.pruning import Pruning
from toolkit.prune.schedule import Schedule


@dataclass(frozen=True)
class Plan:
    """Numbers of a run. Steps are optimizer updates; `max_bad_images` is a share of a split."""

    epochs: int
    steps_per_epoch: int
    accumulation: int
    global_batch_size: int
    log_interval: int
    val_interval: int
    checkpoint_interval: int
    checkpoint_hist: int
    eval_metric: str
    dist_bn: str
    max_bad_images: float

    @property
    def total_steps(self) -> int:
        """Optimizer updates in the whole run."""
        return self.epochs * self.steps_per_epoch


@dataclass
class Run:
    """A run, ready to train."""

    plan: Plan
    engine: Engine
    world: World
    folder: Path
    lock: ExitStack
    scheduler: Any
    ema: Any
    train_loader: TrainLoader
    eval_loader: EvalLoader
    train_loss: Callable[[Tensor, Any], Tensor]  # of scores and what `augment` gives beside the images
    to_inputs: Callable[[Batch], tuple[Tensor, Tensor]]
    augment: Callable[[Tensor, Tensor, int, int], tuple[Tensor, Any]]
    schedule: Schedule  # of mask updates that are still to come: off once the model has shrunk
    goal: Schedule  # what the run is to end at
    prunable: list[tuple[str, Tensor]]
    predict_memory: Callable[[int], tuple[dict[str, int], dict[str, dict[str, int]]]]
    memory: MemoryLog
    start_trackers: Callable[[], list[Any]]  # Accelerate's, of --report-to
    facts: dict[str, Any]
    resume_from: Path | None
    find_smaller: Callable[[], Any] | None = None  # what is left of the model, where the run is to go on with that
    smaller: dict[str, Any] | None = None  # what its checkpoints say where it has

    @property
    def learning_rate(self) -> float:
        """The mean of the optimizer groups' rates."""
        rates = [float(group["lr"]) for group in self.engine.inner_optimizer.param_groups]
        return sum(rates) / len(rates)

    @property
    def pruning_steps(self) -> int:
        """Steps the optimizer's pruning has counted; fp16's scaler may leave out updates that the loop counts."""
        pruning: Pruning | None = getattr(self.engine.inner_optimizer, "pruning", None)
        return 0 if pruning is None else pruning.steps

    @property
    def target_sparsity(self) -> float:
        """The share of zeros asked for by now; a smaller model's optimizer prunes no more, and has reached it."""
        return self.goal.sparsity if self.smaller else self.schedule.sparsity_at(self.pruning_steps)

    def optimizer_step(self, update: int) -> int:
        """The number of the step to be made in the loop's `update`: by the optimizer's own count where it prunes."""
        return self.pruning_steps + 1 if self.schedule.enabled else update

    def masked_parameters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, bit mask) of every parameter that has one."""
        pruning: Pruning | None = getattr(self.engine.inner_optimizer, "pruning", None)
        return iter(()) if pruning is None else pruning.masks()

    def sparsity(self) -> tuple[int, int]:
        """(zeros, weights) over the prunable weights, those of removed channels among them. Call on all ranks."""
        removed = self.smaller["removed_weights"] if self.smaller else 0
        zeros, weights = self.engine.count_zeros(self.prunable)
        return zeros + removed, weights + removed
