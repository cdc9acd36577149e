"""The training loop: epochs of steps, evaluation, records, checkpoints. The order of a step is in `_train_epoch`."""

import math
import signal
import time
from types import FrameType
from typing import Any

import torch
from timm.utils import distribute_bn

from toolkit.engine.checkpoint import load_checkpoint, random_state, restore_random_state
from toolkit.engine.evaluate import EvalResult, evaluate
from toolkit.engine.records import History, write_records
from toolkit.engine.run import Run
from toolkit.engine.scalars import MIB
from toolkit.engine.step import NonFiniteLossError, StepResult, train_step
from toolkit.log import get_logger
from toolkit.memory.sources import read_device, read_host
from toolkit.progress import Progress, duration
from toolkit.prune.mask import flat, unpack_bits

__all__ = ["InterruptedRunError", "SparsityError", "train"]

_log = get_logger()


class InterruptedRunError(Exception):
    """The run was asked to stop and has saved where it stands."""


class SparsityError(Exception):
    """The model does not have the zeros that were asked for."""


class _StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag that all ranks agree on at the next step; a second Ctrl-C breaks off."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_StopRequest":
        self._before = [signal.signal(number, self._handle) for number in self._SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(self._SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def train(run: Run) -> History:
    """Train to the end of the plan. Call on all ranks.

    Raises InterruptedRunError after a requested stop (a checkpoint is written), NonFiniteLossError, and SparsityError
    if the final number of zeros is not floor(sparsity × prunable weights).
    """
    history = _resume(run)
    bar = Progress(run.plan.total_steps, "steps", "train", write=lambda line: None) if run.world.is_main else None
    if bar is not None:
        bar.advance(history.epoch * run.plan.steps_per_epoch + history.step)
    try:
        with _StopRequest() as stop:
            while history.epoch < run.plan.epochs:
                _train_epoch(run, history, stop, bar)
                _finish_epoch(run, history)
        _check_sparsity(run)
        _write(run, history, completed=True)
    except (InterruptedRunError, NonFiniteLossError, SparsityError):
        _close(run, bar)  # all ranks raise these together; after any other error a gather here could wait for ever
        raise
    _close(run, bar)
    return history


def _close(run: Run, bar: Progress | None) -> None:
    if bar is not None:
        bar.close()
    run.memory.write(run.folder, run.facts, run.predict_memory())
    run.scalars.close()


def _train_epoch(run: Run, history: History, stop: _StopRequest, bar: Progress | None) -> None:
    plan, begin = run.plan, time.perf_counter()
    run.model.train()
    sums = history.loss_sums_so_far
    own = sums[run.world.rank] if len(sums) == run.world.num_ranks else sum(sums) * run.world.is_main
    loss_sum = torch.full((), float(own), dtype=torch.float64, device=run.world.device)
    batches = run.train_loader.epoch(history.epoch, history.step)
    window = _Window(run)
    while history.step < plan.steps_per_epoch:
        update = history.epoch * plan.steps_per_epoch + history.step + 1
        logs = update % plan.log_interval == 0 or history.step + 1 == plan.steps_per_epoch
        result = train_step(run, batches, update, history.epoch, stop=stop.asked, want_grad_norm=logs)
        run.scheduler.step_update(num_updates=update)
        if run.ema is not None:
            run.ema.update(run.bare_model, step=update)
        loss_sum += result.loss
        history.step += 1
        history.bad_so_far += result.num_bad
        window.add(result)
        if bar is not None:
            bar.advance()
        if logs:
            window.report(update, history)
        due = plan.checkpoint_interval and update % plan.checkpoint_interval == 0
        if due or result.stop:
            now = time.perf_counter()
            history.loss_sums_so_far = run.world.gather(loss_sum.item())
            history.seconds_so_far += now - begin
            history.train_seconds_so_far += now - begin
            begin = now
            _save(run, history, update)
        if result.stop:
            _write(run, history, completed=False)
            raise InterruptedRunError(
                f"stopped at step {update} of {plan.total_steps}, checkpoint saved in {run.folder}; the same command "
                f"with --experiment {run.folder.name} --resume auto goes on from here"
            )
    total = run.world.sum(loss_sum.clone()).item()
    history.train_loss.append(total / run.world.num_ranks / plan.steps_per_epoch)
    elapsed = time.perf_counter() - begin
    history.seconds_so_far += elapsed
    history.train_seconds_so_far += elapsed


class _Window:
    """What happened since the last log line, and the line and scalars made of it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._clear()

    def _clear(self) -> None:
        self._begin = time.perf_counter()
        self._results: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    def report(self, update: int, history: History) -> None:
        """One vector sum over the ranks, then a log line and the scalars. Call on all ranks."""
        run, plan, results = self._run, self._run.plan, self._results
        elapsed = time.perf_counter() - self._begin
        losses = torch.stack([result.loss for result in results]).double().mean()
        rest = torch.tensor(
            [sum(r.wait_s for r in results) / elapsed, sum(r.num_bad for r in results)],
            dtype=torch.float64, device=losses.device,
        )  # fmt: skip
        loss, wait, bad = run.world.sum(torch.cat([losses[None], rest])).tolist()
        loss, wait = loss / run.world.num_ranks, wait / run.world.num_ranks
        zeros, weights = run.sparsity()
        rate = len(results) * plan.global_batch_size / elapsed
        grad_norm = results[-1].grad_norm
        learning_rate = _learning_rate(run)
        ledger, device = run.memory.sample(update), read_device(run.world.device)
        in_mib = {name: None if size is None else size / MIB for name, size in device.items()}
        run.scalars.write(
            {
                "train/loss": loss, "train/lr": learning_rate, "train/images_per_sec": rate,
                "train/grad_norm": None if grad_norm is None else float(grad_norm), "train/data_wait(%)": 100 * wait,
                "train/epoch": update / plan.steps_per_epoch, "train/bad_images": bad,
                "pruning/sparsity": zeros / max(weights, 1), "pruning/target_sparsity": run.schedule.target(update),
                "memory/max_allocated(MiB)": in_mib["allocated_peak_bytes"],
                "memory/max_reserved(MiB)": in_mib["reserved_peak_bytes"],
                "memory/device_used(MiB)": in_mib["device_used_bytes"],
                "memory/rss(MiB)": read_host()["rss_bytes"] / MIB,
                **{f"memory/ledger/{row}(MiB)": size / MIB for row, size in ledger.items()},
            },
            update,
        )  # fmt: skip
        left = (plan.total_steps - update) * elapsed / len(results)
        pruned = f"  Sparsity: {100 * zeros / max(weights, 1):.2f} %" if run.schedule.on else ""
        _log.info(
            "Train: %d [%4d/%d (%3.0f%%)]  Loss: %.4g  Time: %.3fs, %7.2f/s  LR: %.3e  Data: %.0f %%%s  Left: %s",
            history.epoch, history.step, plan.steps_per_epoch, 100 * history.step / plan.steps_per_epoch, loss,
            elapsed / len(results), rate, learning_rate, 100 * wait, pruned, duration(left),
        )  # fmt: skip
        self._clear()


def _finish_epoch(run: Run, history: History) -> None:
    """Evaluate, record and save; `history` moves on to the next epoch."""
    plan, begin, update = run.plan, time.perf_counter(), (history.epoch + 1) * run.plan.steps_per_epoch
    epoch = history.epoch
    if plan.dist_bn and run.world.num_ranks > 1:
        distribute_bn(run.bare_model, run.world.num_ranks, plan.dist_bn == "reduce")
    result: EvalResult | None = None
    if (epoch + 1) % plan.val_interval == 0 or epoch + 1 == plan.epochs:
        if run.ema is not None:
            _mask_average(run)
            if plan.dist_bn and run.world.num_ranks > 1:
                # Rank 0's statistics, which the checkpoint holds: a mean over ranks would differ after a resume.
                distribute_bn(run.ema, run.world.num_ranks, reduce=False)
        result = evaluate(run, run.bare_model if run.ema is None else run.ema.module)
        run.scalars.write(
            {"eval/loss": result.loss, "eval/top1": result.top1, "eval/top5": result.top5}, update
        )  # fmt: skip
        _log.info(
            "Test: %d  Loss: %.4f  Acc@1: %.3f  Acc@5: %.3f  (%d images, %d unreadable, %s)",
            epoch, result.loss, result.top1, result.top5, result.num_samples, result.num_bad,
            duration(time.perf_counter() - begin),
        )  # fmt: skip
    zeros, weights = run.sparsity()
    images = plan.steps_per_epoch * plan.global_batch_size
    history.eval_loss.append(None if result is None else result.loss)
    history.eval_top1.append(None if result is None else result.top1)
    history.eval_top5.append(None if result is None else result.top5)
    history.lr.append(_learning_rate(run))
    history.sparsity.append(zeros / max(weights, 1))
    history.epoch_s.append(history.seconds_so_far + time.perf_counter() - begin)
    history.images_per_sec.append(images / history.train_seconds_so_far)
    bad = torch.tensor(history.bad_so_far, dtype=torch.int64, device=run.world.device)
    history.bad_images.append(int(run.world.sum(bad)))
    metric = getattr(result, plan.eval_metric) if result is not None else None
    run.scheduler.step(epoch + 1, metric)
    best = metric is not None and (history.best is None or _better(metric, history.best, plan.eval_metric))
    if best:
        history.best, history.best_epoch = metric, epoch
        _log.info("*** Best metric: %s (epoch %d)", metric, epoch)
    history.epoch, history.step = epoch + 1, 0
    history.loss_sums_so_far, history.bad_so_far = [], 0
    history.seconds_so_far = history.train_seconds_so_far = 0.0
    _save(run, history, update, metric, best)
    _write(run, history, completed=False)


def _better(metric: float, best: float, name: str) -> bool:
    return metric < best if name == "loss" else metric > best


def _learning_rate(run: Run) -> float:
    rates = [float(group["lr"]) for group in run.bare_optimizer.param_groups]
    return sum(rates) / len(rates)


@torch.no_grad()
def _mask_average(run: Run) -> None:
    """Put the masks on the averaged weights: the average of a pruned weight decays but does not reach 0."""
    masks = {id(parameter): mask for parameter, mask in run.masked_parameters()}
    averaged = dict(run.ema.module.named_parameters())
    for name, parameter in run.bare_model.named_parameters():
        if id(parameter) in masks:
            average = averaged[name]
            flat(average).masked_fill_(~unpack_bits(masks[id(parameter)], average.numel()), 0.0)


def _check_sparsity(run: Run) -> None:
    """Fail loudly unless the zeros are those asked for, in the weights and in their average."""
    if not run.schedule.on:
        return
    zeros, weights = run.sparsity()
    wanted = math.floor(run.schedule.sparsity * weights)
    if zeros != wanted:
        raise SparsityError(
            f"the model has {zeros} zeros among {weights} prunable weights, --sparsity {run.schedule.sparsity} asks "
            f"for {wanted}; the last mask update is at step {run.schedule.end_step} of {run.plan.total_steps}"
        )
    _log.info("Sparsity: %d zeros among %d prunable weights = %.4f %%", zeros, weights, 100 * zeros / weights)


def _write(run: Run, history: History, *, completed: bool) -> None:
    if run.world.is_main:
        write_records(run.folder, history, run.facts, target=run.schedule.sparsity, completed=completed)


def _save(run: Run, history: History, update: int, metric: float | None = None, best: bool = False) -> None:
    """Write a checkpoint of everything that makes the next step what it would have been. Call on all ranks."""
    if run.ema is not None:
        _mask_average(run)
    random_states = run.world.gather(random_state(run.world.device))
    bad_so_far = sum(run.world.gather(history.bad_so_far))
    scaler = run.accelerator.scaler
    state: dict[str, Any] = {
        "identity": {key: run.facts[key] for key in _IDENTITY},
        "history": {**history.to_dict(), "bad_so_far": bad_so_far},
        "model": run.bare_model.state_dict(),
        "ema": run.ema.module.state_dict() if run.ema is not None else None,
        "optimizer": run.bare_optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "random": random_states,
    }
    run.checkpoints.save(state, update, metric, best)


# What must be the same for a resumed run to be the same run. The number of ranks may change.
_IDENTITY = ("model", "opt", "global_batch_size", "seed", "steps_per_epoch", "data_fingerprint", "target_sparsity")


def _resume(run: Run) -> History:
    if run.resume_from is None:
        return History()
    state = load_checkpoint(run.resume_from)
    for key in _IDENTITY:
        if state["identity"][key] != run.facts[key]:
            raise ValueError(
                f"--resume: the checkpoint has {key} {state['identity'][key]}, this run {run.facts[key]}; use the "
                "settings of the checkpoint's args.yaml, or another --experiment"
            )
    run.bare_model.load_state_dict(state["model"])
    run.bare_optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    if run.ema is not None and state["ema"] is not None:
        run.ema.module.load_state_dict(state["ema"])
    if run.accelerator.scaler is not None and state["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    history = History(**state["history"])
    if not run.world.is_main:
        history.bad_so_far = 0  # rank 0 goes on with the count of all
    restore_random_state(state["random"], run.world)
    _log.info(
        "Resumed from %s: epoch %d, step %d of %d", run.resume_from, history.epoch, history.step,
        run.plan.steps_per_epoch,
    )  # fmt: skip
    return history
