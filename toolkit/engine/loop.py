"""The training loop: epochs of steps, evaluation, records, checkpoints. The order of a step is in `train_epoch`."""

import contextlib
import time
from typing import Any, NoReturn

import torch
from timm.utils import distribute_bn

from toolkit.engine.evaluate import EvalResult, evaluate
from toolkit.engine.history import History, write_records
from toolkit.engine.masks import AverageMasks, check_masks, tell_of_idle_weights
from toolkit.engine.metrics import Metrics
from toolkit.engine.run import Run
from toolkit.engine.signals import StopRequest
from toolkit.engine.snapshot import load_snapshot, save_snapshot
from toolkit.engine.step import train_step
from toolkit.errors import (
    InterruptedRunError,
    LostRankError,
    ModelShrunkError,
    RunError,
    SparsityError,
    TooManyBadImagesError,
)
from toolkit.log import get_logger
from toolkit.markdown import MIB
from toolkit.memory.ledger import count_bytes, optimizer_bytes
from toolkit.memory.report import write_report, write_report_of_survivors
from toolkit.progress import Progress, duration

_log = get_logger()


def train(run: Run) -> History:
    """Train to the end of the plan. Call on all ranks.

    Raises ModelShrunkError where the run is to be built anew with fewer channels, InterruptedRunError after a requested
    stop (both have written a checkpoint), LostRankError, MasksDifferError, NonFiniteLossError, TooManyBadImagesError,
    and SparsityError if the final number of zeros is not what the schedule asks for.
    """
    history = load_snapshot(run)
    done = history.epoch * run.plan.steps_per_epoch + history.step
    bar = Progress(run.plan.total_steps, "steps", "train", done, lambda line: None) if run.world.is_main else None
    metrics = Metrics(run)
    with (
        StopRequest() as stop,  # around all: the launcher sends SIGTERM when a rank is lost
        run.lock,
        contextlib.closing(run.memory),
        contextlib.closing(metrics),
        bar or contextlib.nullcontext(),
    ):
        try:
            while history.epoch < run.plan.epochs:
                if _may_shrink(run):
                    _go_on_smaller(run, history)
                train_epoch(run, history, stop, metrics, bar)
                if run.plan.dist_bn and run.world.num_ranks > 1:
                    # Also before a stop: its checkpoint has rank 0's statistics, which are now everyone's.
                    distribute_bn(run.engine.module, run.world.num_ranks, run.plan.dist_bn == "reduce")
                if _is_asked(run, stop):
                    _interrupt(run, history)
                _finish_epoch(run, history, stop, metrics)
            _check_sparsity(run)
            _write_memory(run)
            metrics.write_settings(run.facts)
            _write(run, history, completed=True)  # last: it says that everything else is there
        except RunError:
            _write_memory(run)  # all ranks raise it together; after any other error a gather could wait for ever
            raise
        except Exception as error:
            lost = _write_memory_of_survivors(run, error)
            if lost and LostRankError.explains(error):
                raise LostRankError(lost) from error
            raise
    return history


def _is_asked(run: Run, stop: StopRequest) -> bool:
    """Whether any rank was asked to stop. Call on all ranks."""
    asked = torch.tensor(float(stop.asked), device=run.world.device)
    return bool(run.world.max(asked).item())


class _StopEvaluation(Exception):
    """Ends an evaluation, so that what is saved next are the weights trained, not the averages evaluated."""


def _interrupt(run: Run, history: History) -> NoReturn:
    update = history.epoch * run.plan.steps_per_epoch + history.step
    saved = save_snapshot(run, history, update)
    _write(run, history, completed=False)
    where = f"checkpoint saved in {run.folder}" if saved else "NO checkpoint could be written of it (see above)"
    raise InterruptedRunError(
        f"stopped at step {update} of {run.plan.total_steps}, {where}; the same command with --experiment "
        f"{run.folder.name} --resume auto goes on from {'here' if saved else 'the one before, if any'}"
    )


def _may_shrink(run: Run) -> bool:
    """Whether the last mask update is made, by the optimizer's count, and the model is still whole."""
    return run.find_smaller is not None and run.pruning_steps >= (run.schedule.end_step or 0)


def _go_on_smaller(run: Run, history: History) -> NoReturn:
    """Save the model without its pruned channels, and leave for it to be built. Call on all ranks."""
    assert run.find_smaller is not None
    update = history.epoch * run.plan.steps_per_epoch + history.step
    smaller = run.find_smaller()
    if not save_snapshot(run, history, update, smaller=smaller):
        raise RunError("the smaller model could not be saved (see above); make room, then --resume auto goes on")
    _write(run, history, completed=False)
    raise ModelShrunkError(
        f"step {update}: the run goes on without the {smaller.removed_weights:,} weights of its pruned channels"
    )


def train_epoch(run: Run, history: History, stop: StopRequest, metrics: Metrics, bar: Progress | None = None) -> None:
    """Train from `history.step` to the end of the epoch, without its evaluation. Call on all ranks."""
    plan, begin = run.plan, time.perf_counter()
    run.engine.model.train()
    sums, ranks = history.loss_sums_so_far, run.world.num_ranks
    # Each rank's own sum; after a change of the number of ranks rank 0 holds what keeps the mean.
    own = sums[run.world.rank] if len(sums) == ranks else sum(sums) * ranks / max(len(sums), 1) * run.world.is_main
    loss_sum = torch.full((), float(own), dtype=torch.float64, device=run.world.device)
    batches = run.train_loader.epoch(history.epoch, history.step)
    average_masks = AverageMasks(run)
    metrics.begin_window()

    def account() -> None:
        nonlocal begin
        now = time.perf_counter()
        history.loss_sums_so_far = run.world.gather(loss_sum.item())
        history.seconds_so_far += now - begin
        history.train_seconds_so_far += now - begin
        begin = now

    while history.step < plan.steps_per_epoch:
        update = history.epoch * plan.steps_per_epoch + history.step + 1
        logs = update % plan.log_interval == 0 or history.step + 1 == plan.steps_per_epoch
        step = run.optimizer_step(update)
        run.memory.enter_step(step)
        # Watched is one step a phase; of a compiled model none, for under the tracker it would be compiled anew.
        with contextlib.nullcontext() if run.engine.is_compiled else run.memory.probe(step) as probe:
            result = train_step(run, batches, update, history.epoch, stop=stop.asked, want_grad_norm=logs, probe=probe)
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=update)
        if run.ema is not None:
            run.ema.update(run.engine.held(), step=update)
            average_masks.apply()
        loss_sum += result.loss
        tell_of_idle_weights(run, step)
        if run.pruning_steps == step and run.schedule.is_update_step(step):
            check_masks(run)
            if step == run.schedule.end_step:
                _release_memory(run)
        history.step += 1
        history.bad_so_far += result.num_bad
        metrics.results.append(result)
        if bar is not None:
            bar.advance()
        if logs:
            bad = metrics.report(update, history)
            _check_bad(bad, len(run.train_loader.index), plan.max_bad_images, "training")
        if result.stop and history.step < plan.steps_per_epoch:  # else after the epoch's end, which is here
            account()
            _interrupt(run, history)
        if history.step < plan.steps_per_epoch and _may_shrink(run):
            account()
            _go_on_smaller(run, history)
        if plan.checkpoint_interval and update % plan.checkpoint_interval == 0 and history.step < plan.steps_per_epoch:
            account()
            save_snapshot(run, history, update)
    account()


def _release_memory(run: Run) -> None:
    """After the last mask update nothing is re-packed any more: give the blocks of the dense moments back, once."""
    before = max((row["optimizer_bytes"] for row in run.memory.timeline), default=None)
    now = optimizer_bytes(count_bytes(run.memory.owners()))
    cache = run.memory.release_cache()
    _log.info(
        "The last mask update is done: optimizer and pruning keep %.1f MiB%s%s",
        now / MIB,
        "" if before is None else f" (before up to {before / MIB:.1f})",
        ""
        if cache is None
        else f"; the allocator gave back {(cache[0] - cache[1]) / MIB:.0f} of its {cache[0] / MIB:.0f} MiB",
    )


def _check_bad(bad: int, total: int, share: float, what: str) -> None:
    """Raise TooManyBadImagesError where `bad` of `total` images are more than `share` of them, and than ten."""
    limit = max(10, int(share * total))
    if bad > limit:
        raise TooManyBadImagesError(
            f"{bad} of {total} {what} images could not be read, more than {limit}; the log names the first ones, "
            "python -m shards.verify finds all, --max-bad-images lets more by"
        )


def _evaluate(run: Run, history: History, stop: StopRequest, metrics: Metrics, update: int) -> EvalResult:
    """The epoch's evaluation, of the average of the weights where there is one; written and logged."""
    plan, begin = run.plan, time.perf_counter()

    def stop_if_asked() -> None:
        if _is_asked(run, stop):
            raise _StopEvaluation

    result = None
    with (
        run.memory.during("evaluation"),
        run.engine.evaluated(run.ema and run.ema.module) as model,
        contextlib.suppress(_StopEvaluation),
    ):
        if run.ema is not None and plan.dist_bn and run.world.num_ranks > 1:
            # Rank 0's statistics, which the checkpoint holds: a mean over ranks would differ after a resume.
            distribute_bn(model, run.world.num_ranks, reduce=False)
        result = evaluate(run, model, between=stop_if_asked)
    if result is None:
        _interrupt(run, history)
    metrics.write({"eval/loss": result.loss, "eval/top1": result.top1, "eval/top5": result.top5}, update)
    _log.info(
        "Test: %d  Loss: %.4f  Acc@1: %.3f  Acc@5: %.3f  (%d images, %d unreadable, %s)",
        history.epoch,
        result.loss,
        result.top1,
        result.top5,
        result.num_samples,
        result.num_bad,
        duration(time.perf_counter() - begin),
    )
    _check_bad(result.num_bad, result.num_samples + result.num_bad, plan.max_bad_images, "evaluation")
    return result


def _finish_epoch(run: Run, history: History, stop: StopRequest, metrics: Metrics) -> None:
    """Evaluate, record and save; `history` moves on to the next epoch, and is as before after a stop."""
    plan, begin, update = run.plan, time.perf_counter(), (history.epoch + 1) * run.plan.steps_per_epoch
    epoch, result = history.epoch, None
    if (epoch + 1) % plan.val_interval == 0 or epoch + 1 == plan.epochs:
        result = _evaluate(run, history, stop, metrics, update)
    zeros, weights = run.sparsity()
    loss_sums, bad = history.loss_sums_so_far, torch.tensor(history.bad_so_far, device=run.world.device)
    history.end_epoch(
        train_loss=sum(loss_sums) / len(loss_sums) / plan.steps_per_epoch,
        eval_loss=result and result.loss,
        eval_top1=result and result.top1,
        eval_top5=result and result.top5,
        lr=run.learning_rate,
        sparsity=zeros / max(weights, 1),
        epoch_s=history.seconds_so_far + time.perf_counter() - begin,
        images_per_sec=plan.steps_per_epoch * plan.global_batch_size / history.train_seconds_so_far,
        bad_images=int(run.world.sum(bad)),
    )
    metric = getattr(result, plan.eval_metric) if result is not None else None
    if run.scheduler is not None:
        run.scheduler.step(epoch + 1, metric)
    sign = -1 if plan.eval_metric == "loss" else 1
    best = metric is not None and (history.best is None or sign * metric > sign * history.best)
    if best:
        history.best = metric
        _log.info("*** Best metric: %s (epoch %d)", metric, epoch)
    save_snapshot(run, history, update, metric, best)
    _write(run, history, completed=False)


def _check_sparsity(run: Run) -> None:
    """Fail loudly unless the zeros are those asked for."""
    goal = run.goal
    if not goal.enabled:
        return
    zeros, weights = run.sparsity()
    wanted = goal.num_zeros_at(goal.end_step or 0, weights)
    if not goal.is_reached(zeros, weights):
        raise SparsityError(
            f"the model has {zeros} zeros among {weights} prunable weights, --sparsity {goal.sparsity} asks "
            f"for {wanted}; the last mask update is at step {goal.end_step} of {run.plan.total_steps}"
        )
    short = f", {wanted - zeros} short of what was asked for: channels go whole" if zeros < wanted else ""
    _log.info("Sparsity: %d zeros among %d prunable weights = %.4f %%%s", zeros, weights, 100 * zeros / weights, short)


def _write_memory(run: Run) -> None:
    write_report(run.memory, run.world, run.folder, run.facts, run.predict_memory)


def _write_memory_of_survivors(run: Run, error: Exception) -> list[dict[str, Any]]:
    """The report of the ranks that are left, without a collective; returns those that left no last word.

    A failure here must not hide the error.
    """
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    try:
        return write_report_of_survivors(run.memory, run.world, run.folder, run.facts, run.predict_memory, reason)
    except Exception as second:
        _log.error("memory.json could not be written: %s", second)
        return []


def _write(run: Run, history: History, *, completed: bool) -> None:
    if run.world.is_main:
        write_records(run.folder, history, run.facts, completed=completed)
