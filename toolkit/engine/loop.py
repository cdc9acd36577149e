"""The training loop: epochs of steps, evaluation, records, checkpoints. The order of a step is in `train_epoch`."""

import contextlib
import math
import os
import time
from typing import Any, NoReturn

import torch
from timm.utils import distribute_bn
from torch import Tensor

from toolkit.engine.evaluate import EvalResult, evaluate
from toolkit.engine.history import History, write_records
from toolkit.engine.masks import MasksDifferError, check_masks
from toolkit.engine.run import Run
from toolkit.engine.scalars import MIB, memory_columns, memory_scalars
from toolkit.engine.snapshot import load_snapshot, save_snapshot
from toolkit.engine.step import NonFiniteLossError, StepResult, train_step
from toolkit.engine.stops import (
    InterruptedRunError,
    LostRankError,
    SparsityError,
    StopRequest,
    TooManyBadImagesError,
    check_bad,
)
from toolkit.log import get_logger
from toolkit.memory.allocator import read_device, read_host
from toolkit.memory.ledger import count_bytes, optimizer_bytes
from toolkit.memory.probe import StepProbe
from toolkit.memory.report import write_report, write_report_of_survivors
from toolkit.progress import Progress, duration
from toolkit.prune.mask import flat_view, zero_pruned

__all__ = ["train", "train_epoch"]

_log = get_logger()

_SLOW_DATA = 0.2  # share of the time spent waiting for data above which the log says what to change


def train(run: Run) -> History:
    """Train to the end of the plan. Call on all ranks.

    Raises InterruptedRunError after a requested stop (a checkpoint is written), LostRankError, MasksDifferError,
    NonFiniteLossError, TooManyBadImagesError, and SparsityError if the final number of zeros is not
    floor(sparsity × prunable weights).
    """
    history = load_snapshot(run)
    done = history.epoch * run.plan.steps_per_epoch + history.step
    bar = Progress(run.plan.total_steps, "steps", "train", done, lambda line: None) if run.world.is_main else None
    with StopRequest() as stop:  # around all: the launcher sends SIGTERM when a rank is lost
        try:
            while history.epoch < run.plan.epochs:
                train_epoch(run, history, stop, bar)
                if run.plan.dist_bn and run.world.num_ranks > 1:  # before a stop, whose checkpoint has one rank's
                    distribute_bn(run.bare_model, run.world.num_ranks, run.plan.dist_bn == "reduce")
                _stop_if_asked(run, history, stop)
                _finish_epoch(run, history, stop)
            _check_sparsity(run)
            _write_memory(run)
            run.scalars.write_settings(run.facts)
            _write(run, history, completed=True)  # last: it says that everything else is there
        except (InterruptedRunError, MasksDifferError, NonFiniteLossError, SparsityError, TooManyBadImagesError):
            _write_memory(run)  # all ranks raise these together; after any other error a gather could wait for ever
            raise
        except Exception as error:
            lost = _write_memory_of_survivors(run, error)
            if lost and LostRankError.explains(error):
                raise LostRankError(lost) from error
            raise
        finally:
            if bar is not None:
                bar.close()
            run.scalars.close()
            run.memory.close()
            if run.lock is not None:
                run.lock.release()
    return history


def _stop_if_asked(run: Run, history: History, stop: StopRequest) -> None:
    """Save and leave, before or in a long evaluation, if any rank was asked to stop. Call on all ranks."""
    asked = torch.tensor(float(stop.asked), device=run.world.device)
    if run.world.max(asked).item():
        _interrupt(run, history)


def _interrupt(run: Run, history: History) -> NoReturn:
    update = history.epoch * run.plan.steps_per_epoch + history.step
    saved = save_snapshot(run, history, update)
    _write(run, history, completed=False)
    where = f"checkpoint saved in {run.folder}" if saved else "NO checkpoint could be written of it (see above)"
    raise InterruptedRunError(
        f"stopped at step {update} of {run.plan.total_steps}, {where}; the same command with --experiment "
        f"{run.folder.name} --resume auto goes on from {'here' if saved else 'the one before, if any'}"
    )


def train_epoch(run: Run, history: History, stop: StopRequest, bar: Progress | None) -> None:
    """Train from `history.step` to the end of the epoch, without its evaluation. Call on all ranks."""
    plan, begin = run.plan, time.perf_counter()
    run.model.train()
    sums, ranks = history.loss_sums_so_far, run.world.num_ranks
    # Each rank's own sum; after a change of the number of ranks rank 0 holds what keeps the mean.
    own = sums[run.world.rank] if len(sums) == ranks else sum(sums) * ranks / max(len(sums), 1) * run.world.is_main
    loss_sum = torch.full((), float(own), dtype=torch.float64, device=run.world.device)
    batches = run.train_loader.epoch(history.epoch, history.step)
    window, masks = _Window(run), _AverageMasks(run)

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
        run.memory.enter_step(update)
        with _memory_probe(run, update) as probe:
            result = train_step(run, batches, update, history.epoch, stop=stop.asked, want_grad_norm=logs, probe=probe)
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=update)
        if run.ema is not None:
            run.ema.update(run.bare_model, step=update)
            masks.apply()
        loss_sum += result.loss
        if run.schedule.is_update_step(update):
            check_masks(run)
            if update == run.schedule.end_step:
                _release_memory(run)
        history.step += 1
        history.bad_so_far += result.num_bad
        window.add(result)
        if bar is not None:
            bar.advance()
        if logs:
            window.report(update, history)
        if result.stop and history.step < plan.steps_per_epoch:  # else after the epoch's end, which is here
            account()
            _interrupt(run, history)
        if plan.checkpoint_interval and update % plan.checkpoint_interval == 0 and history.step < plan.steps_per_epoch:
            account()
            save_snapshot(run, history, update)
    account()


def _memory_probe(run: Run, update: int) -> contextlib.AbstractContextManager[StepProbe | None]:
    """Watches one step a phase; of a compiled model none, for under the tracker it would be compiled anew."""
    return contextlib.nullcontext() if hasattr(run.model, "_orig_mod") else run.memory.probe(update)


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


class _Window:
    """What happened since the last log line, and the line and scalars made of it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._advised = False
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
        device = read_device(run.world.device)  # before the sample, whose record begins new peaks
        ledger = run.memory.sample(update)
        rest = torch.tensor(
            [sum(r.wait_s for r in results) / elapsed, history.bad_so_far],
            dtype=torch.float64,
            device=losses.device,
        )
        columns = memory_columns(run.world, {"ledger": sum(ledger.values()), **device}).to(losses.device)
        sums = run.world.sum(torch.cat([losses[None], rest, columns.flatten()]))
        loss, wait, bad = sums[:3].tolist()
        loss, wait = loss / run.world.num_ranks, wait / run.world.num_ranks
        zeros, weights = run.sparsity()
        rate = len(results) * plan.global_batch_size / elapsed
        grad_norm = results[-1].grad_norm
        learning_rate = _learning_rate(run)
        run.scalars.write(
            {
                "train/loss": loss,
                "train/lr": learning_rate,
                "train/images_per_sec": rate,
                "train/grad_norm": None if grad_norm is None else float(grad_norm),
                "train/data_wait(%)": 100 * wait,
                "train/epoch": update / plan.steps_per_epoch,
                "train/bad_images": bad,
                "pruning/sparsity": zeros / max(weights, 1),
                "pruning/target_sparsity": run.schedule.sparsity_at(update),
                **memory_scalars(sums[3:].view_as(columns), on_gpu=run.world.device.type == "cuda"),
                "memory/num_alloc_retries": device["alloc_retries"],
                "memory/num_ooms": device["ooms"],
                "memory/rss(MiB)": read_host()["rss_bytes"] / MIB,
                **{f"memory/ledger/{row}(MiB)": size / MIB for row, size in ledger.items()},
            },
            update,
        )
        left = (plan.total_steps - update) * elapsed / len(results)
        pruned = f"  Sparsity: {100 * zeros / max(weights, 1):.2f} %" if run.schedule.enabled else ""
        _log.info(
            "Train: %d [%4d/%d (%3.0f%%)]  Loss: %.4g  Time: %.3fs, %7.2f/s  LR: %.3e  Data: %.0f %%%s  Left: %s",
            history.epoch,
            history.step,
            plan.steps_per_epoch,
            100 * history.step / plan.steps_per_epoch,
            loss,
            elapsed / len(results),
            rate,
            learning_rate,
            100 * wait,
            pruned,
            duration(left),
        )
        if wait > _SLOW_DATA and not self._advised:
            self._advised = True
            _log.info(
                "training waits %.0f %% of its time for data: raise --workers (now %d a rank; this host has %d cores), "
                "leave out --color-jitter and --aa, or make smaller images (python -m shards.imagenet --max-short)",
                100 * wait,
                run.train_loader.workers,
                os.cpu_count() or 1,
            )
        check_bad(int(bad), len(run.train_loader.index), plan.max_bad_images, "training")
        self._clear()


def _finish_epoch(run: Run, history: History, stop: StopRequest) -> None:
    """Evaluate, record and save; `history` moves on to the next epoch, and is as before after a stop."""
    plan, begin, update = run.plan, time.perf_counter(), (history.epoch + 1) * run.plan.steps_per_epoch
    epoch = history.epoch
    result: EvalResult | None = None
    if (epoch + 1) % plan.val_interval == 0 or epoch + 1 == plan.epochs:
        if run.ema is not None and plan.dist_bn and run.world.num_ranks > 1:
            # Rank 0's statistics, which the checkpoint holds: a mean over ranks would differ after a resume.
            distribute_bn(run.ema, run.world.num_ranks, reduce=False)
        with run.memory.during("evaluation"):
            model = run.bare_model if run.ema is None else run.ema.module
            result = evaluate(run, model, between=lambda: _stop_if_asked(run, history, stop))
        run.scalars.write({"eval/loss": result.loss, "eval/top1": result.top1, "eval/top5": result.top5}, update)
        _log.info(
            "Test: %d  Loss: %.4f  Acc@1: %.3f  Acc@5: %.3f  (%d images, %d unreadable, %s)",
            epoch,
            result.loss,
            result.top1,
            result.top5,
            result.num_samples,
            result.num_bad,
            duration(time.perf_counter() - begin),
        )
        check_bad(result.num_bad, result.num_samples + result.num_bad, plan.max_bad_images, "evaluation")
    zeros, weights = run.sparsity()
    images = plan.steps_per_epoch * plan.global_batch_size
    loss_sums = history.loss_sums_so_far
    history.train_loss.append(sum(loss_sums) / len(loss_sums) / plan.steps_per_epoch)
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
    if run.scheduler is not None:
        run.scheduler.step(epoch + 1, metric)
    best = metric is not None and (history.best is None or _better(metric, history.best, plan.eval_metric))
    if best:
        history.best = metric
        _log.info("*** Best metric: %s (epoch %d)", metric, epoch)
    history.epoch, history.step = epoch + 1, 0
    history.loss_sums_so_far, history.bad_so_far = [], 0
    history.seconds_so_far = history.train_seconds_so_far = 0.0
    save_snapshot(run, history, update, metric, best)
    _write(run, history, completed=False)


def _better(metric: float, best: float, name: str) -> bool:
    return metric < best if name == "loss" else metric > best


def _learning_rate(run: Run) -> float:
    rates = [float(group["lr"]) for group in run.bare_optimizer.param_groups]
    return sum(rates) / len(rates)


class _AverageMasks:
    """Puts new masks on the averaged weights.

    Once a pruned weight's average is 0 it stays 0, for the weight is; so a mask is applied when it is new, and the
    average does not depend on when it is evaluated or saved.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._applied: dict[int, Tensor] = {}
        if run.ema is not None:
            names = {id(parameter): name for name, parameter in run.bare_model.named_parameters()}
            averages = dict(run.ema.module.named_parameters())
            self._averages = {key: averages[name] for key, name in names.items()}

    @torch.no_grad()
    def apply(self) -> None:
        for parameter, mask in self._run.masked_parameters():
            if self._applied.get(id(parameter)) is not mask:
                average = self._averages[id(parameter)]
                zero_pruned(flat_view(average), mask)
                self._applied[id(parameter)] = mask


def _check_sparsity(run: Run) -> None:
    """Fail loudly unless the zeros are those asked for."""
    if not run.schedule.enabled:
        return
    zeros, weights = run.sparsity()
    wanted = math.floor(run.schedule.sparsity * weights)
    if zeros != wanted:
        raise SparsityError(
            f"the model has {zeros} zeros among {weights} prunable weights, --sparsity {run.schedule.sparsity} asks "
            f"for {wanted}; the last mask update is at step {run.schedule.end_step} of {run.plan.total_steps}"
        )
    _log.info("Sparsity: %d zeros among %d prunable weights = %.4f %%", zeros, weights, 100 * zeros / weights)


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
        write_records(run.folder, history, run.facts, target=run.schedule.sparsity, completed=completed)
