"""A run as a checkpoint: everything that makes the next step what it would have been, saved and loaded."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from torch import Tensor

from toolkit.engine.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from toolkit.engine.history import History
from toolkit.engine.run import Run
from toolkit.engine.shard import Shard
from toolkit.log import get_logger

_log = get_logger()

# What must be the same for a resumed run to be the same run. The number of ranks may change.
IDENTITY = (
    "model",
    "opt",
    "global_batch_size",
    "seed",
    "epochs",
    "steps_per_epoch",
    "data_fingerprint",
    "shuffle_window",
)


def save_snapshot(
    run: Run, history: History, update: int, metric: float | None = None, best: bool = False, smaller: Any = None
) -> bool:
    """Write a checkpoint of everything that makes the next step what it would have been. Call on all ranks.

    With `smaller` the model in it, its average and its moments are without the channels that were pruned, and have no
    masks any more.
    Returns whether it was written; a full disk is logged and no reason to stop.
    """
    with run.memory.during("checkpoint"):
        random_states = run.world.gather(random_state(run.world.device))
        memory_states = run.world.gather(run.memory.state_dict())
        bad_so_far = sum(run.world.gather(history.bad_so_far))
        groups = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in run.engine.inner_optimizer.param_groups
        ]
        plateau = getattr(run.scheduler, "lr_scheduler", None)  # timm's own state leaves out how long it has waited
        state: dict[str, Any] = {
            "history": {**asdict(history), "bad_so_far": bad_so_far},
            "model": {},
            "ema": None if run.ema is None else {},
            "optimizer": {"state": {}, "param_groups": groups},
            "scheduler": run.scheduler and {"outer": run.scheduler.state_dict(), "inner": _state_of(plateau)},
            "scaler": _state_of(run.engine.scaler),
            "random": random_states,
            "memory": memory_states,
            "engine": run.engine.name,
            "smaller": run.smaller if smaller is None else smaller.saved(),
            "versions": {name: str(version) for name, version in run.facts["versions"].items()},
        }
        identity = {key: run.facts[key] for key in IDENTITY}
        return save_checkpoint(
            run.folder / "checkpoints",
            state,
            update,
            world=run.world,
            history=run.plan.checkpoint_hist,
            tensors=_tensors(run, smaller, state["optimizer"]["state"]),
            identity=identity,
            metric=metric,
            best=best,
        )


def _tensors(run: Run, smaller: Any, plain: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Tensor | Shard]]:
    """Key and this rank's part of every tensor; what some of timm's optimizers keep as numbers goes to `plain`."""

    def cut(name: str, part: Any) -> Tensor | Shard:
        return part if smaller is None else smaller.cut(name, part.cpu())  # of whole ones: others are not made smaller

    for name, part in run.engine.weights():
        yield f"model.{name}", cut(name, part)
    for name, key, value in run.engine.optimizer_states():
        if not isinstance(value, Tensor | Shard):
            plain.setdefault(name, {})[key] = value
        elif smaller is None or key != "mask":
            yield f"optimizer.{key}.{name}", cut(name, value)
    for name, part in () if run.ema is None else run.engine.weights(run.ema.module):
        yield f"ema.{name}", cut(name, part)


def _state_of(part: Any) -> dict[str, Any] | None:
    return None if part is None else part.state_dict()


def load_snapshot(run: Run) -> History:
    """Load the checkpoint the run was built to go on from, if any."""
    if run.resume_from is None:
        return History()
    state = load_checkpoint(run.resume_from)
    if (state.get("smaller") is None) != (run.smaller is None):
        raise ValueError(f"{run.resume_from} was replaced while the run was built; start again with --resume")
    run.engine.load_weights(state["model"])
    run.engine.load_optimizer_states(state["optimizer"]["state"], state["optimizer"]["param_groups"])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(state["scheduler"]["outer"])
        if state["scheduler"]["inner"] is not None:
            run.scheduler.lr_scheduler.load_state_dict(state["scheduler"]["inner"])
    if run.ema is not None:
        run.engine.load_average(run.ema.module, state["ema"])
    if run.engine.scaler is not None and state["scaler"] is not None:
        run.engine.scaler.load_state_dict(state["scaler"])
    history = History(**state["history"])
    if not run.world.is_main:
        history.bad_so_far = 0  # rank 0 goes on with the count of all
    if run.world.rank < len(state["memory"]):
        run.memory.load_state_dict(state["memory"][run.world.rank])
    restore_random_state(state["random"], run.world)
    _log.info(
        "Resumed from %s: epoch %d, step %d of %d",
        run.resume_from,
        history.epoch,
        history.step,
        run.plan.steps_per_epoch,
    )
    return history
