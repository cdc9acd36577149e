"""A run as a checkpoint: everything that makes the next step what it would have been, saved and loaded."""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from toolkit.engine.checkpoint import load_checkpoint, random_state, restore_random_state, save_checkpoint
from toolkit.engine.history import History
from toolkit.engine.run import Run
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
        # Whole tensors one at a time, through all ranks; only rank 0, which writes, keeps them.
        tensors: dict[str, Tensor] = {}
        cut = (lambda name, tensor: tensor) if smaller is None else smaller.cut
        for name, tensor in run.engine.weights():
            if run.world.is_main:
                tensors[f"model.{name}"] = cut(name, tensor)
        plain: dict[str, dict[str, Any]] = {}  # what some of timm's optimizers keep as numbers
        for name, key, value in run.engine.optimizer_states():
            if smaller is not None and key == "mask":
                continue
            if run.world.is_main and isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = cut(name, value)
            elif run.world.is_main:
                plain.setdefault(name, {})[key] = value
        for name, tensor in () if run.ema is None else run.engine.weights(run.ema.module):
            if run.world.is_main:
                tensors[f"ema.{name}"] = cut(name, tensor)
        groups = [
            {key: value for key, value in group.items() if key not in ("params", "param_names")}
            for group in run.engine.inner_optimizer.param_groups
        ]
        plateau = getattr(run.scheduler, "lr_scheduler", None)  # timm's own state leaves out how long it has waited
        state = {
            "history": {**asdict(history), "bad_so_far": bad_so_far},
            "model": {},
            "ema": None if run.ema is None else {},
            "optimizer": {"state": plain, "param_groups": groups},
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
            tensors=tensors,
            identity=identity,
            metric=metric,
            best=best,
        )


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
