"""Config -> Run, stage by stage."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor, nn

import toolkit.optim  # noqa: F401  registers our optimizers
from toolkit.builder.accelerator import create_accelerator, create_engine
from toolkit.builder.data import Augment, augment, create_loaders, input_settings, open_data, to_inputs
from toolkit.builder.distill import Loss, Teacher
from toolkit.builder.metadata import describe, run_facts, write_args
from toolkit.builder.model import create_model, place_model, train_loss
from toolkit.builder.optimizer import (
    apply_recipe,
    base_learning_rate,
    create_optimizer,
    create_schedule,
    goal_of,
    keep_zeros,
    prunable_weights,
    pruning_schedule,
    resolve_optimizer,
    total_epochs,
    with_state_budget,
)
from toolkit.builder.predict import confirm_batch_size, predict_run, with_automatic_batch_size
from toolkit.builder.process import run_folder
from toolkit.builder.smaller import settings_of_the_rest, shrink_as_before, smaller_of
from toolkit.builder.trackers import start_trackers
from toolkit.config import Config
from toolkit.data.loader import TrainLoader
from toolkit.dist import World
from toolkit.engine.engines.ddp import Engine
from toolkit.engine.run import Plan, Run
from toolkit.log import get_logger
from toolkit.memory.ledger import Owners, find_owners
from toolkit.memory.phases import Phase, plan_phases
from toolkit.memory.recorder import RANKS_FOLDER, MemoryLog
from toolkit.prune.schedule import Schedule


def build_run(config: Config) -> Run:
    """See `toolkit.builder.build`."""
    opt, method = resolve_optimizer(config)
    asked = with_state_budget(config)  # args.yaml tells what was asked for
    config = apply_recipe(asked, opt)

    # Data, and the ranks that share it
    data = open_data(config)
    accelerator = create_accelerator(config)
    world = World.detect(accelerator.device)
    memory = MemoryLog(world)
    config = with_automatic_batch_size(config, data, world.num_ranks)

    # Model and batches
    random_seed(config.seed)  # the same model on every rank; samples and mixing have their own generators
    module = create_model(config, data.num_classes)
    smaller = shrink_as_before(module, config, world)
    inputs = input_settings(config, module)
    train_loader, eval_loader = create_loaders(config, data, inputs, world)
    place_model(module, config, world)
    confirm_batch_size(module, config, inputs["input_size"], world.device)

    # Optimizer, schedules, engine
    plan = _plan(config, train_loader)
    lr = base_learning_rate(config, opt, plan.global_batch_size)
    schedule = pruning_schedule(config, method, plan.total_steps)
    goal, (rest, to_prune) = goal_of(config, schedule, module), settings_of_the_rest(config, schedule, smaller, module)
    engine, scheduler, ema = _engine(rest, opt, lr, accelerator, module, to_prune, train_loader.steps, world)
    prunable = prunable_weights(module, config)
    teacher, loss, change = _lesson(config, data.num_classes, module, world)

    # The run's folder, and what the run says of itself
    facts = run_facts(config, data, module, opt, method, lr, goal, plan, world)
    folder, resume_from, lock = run_folder(asked, opt, facts, world)
    torch.manual_seed(config.seed + world.rank)  # each rank draws its own dropout and erasing noise, as in timm
    _begin_folder(folder, dataclasses.replace(asked, batch_size=config.batch_size), facts, module, prunable, world)
    memory.begin(partial(_owners, engine, ema, teacher, world.num_ranks), _phases(config, plan, schedule), folder)
    return Run(
        plan=plan,
        engine=engine,
        world=world,
        folder=folder,
        lock=lock,
        scheduler=scheduler,
        ema=ema,
        train_loader=train_loader,
        eval_loader=eval_loader,
        train_loss=loss,
        to_inputs=to_inputs(inputs, module, config.channels_last),
        augment=change,
        schedule=goal if to_prune.enabled else to_prune,
        goal=goal,
        prunable=prunable,
        predict_memory=partial(_predict, config, engine, facts["num_classes"], world),
        memory=memory,
        start_trackers=partial(start_trackers, config, facts, folder, resume_from),
        facts=facts,
        resume_from=resume_from,
        find_smaller=partial(smaller_of, config, engine.module) if config.prune_shrink and to_prune.enabled else None,
        smaller=None if smaller is None else smaller.saved(),
    )


def _average(config: Config, engine: Engine) -> ModelEmaV3 | None:
    """The moving average of what the engine holds of the weights."""
    if not config.model_ema:
        return None
    return ModelEmaV3(engine.held(), config.model_ema_decay, use_warmup=config.model_ema_warmup)


def _lesson(config: Config, num_classes: int, module: nn.Module, world: World) -> tuple[Teacher | None, Loss, Augment]:
    """A teacher where one is asked for; the loss, and what is done to a batch before it."""
    loss, change = train_loss(config), augment(config, world, config.num_classes or num_classes)
    if not config.kd_model_name:
        return None, loss, change
    teacher = Teacher(config, num_classes, module)
    return teacher, teacher.and_labels(loss), teacher.beside(change)


def _begin_folder(
    folder: Path,
    asked: Config,
    facts: dict[str, Any],
    module: nn.Module,
    prunable: list[tuple[str, Tensor]],
    world: World,
) -> None:
    """On the main rank say what was asked for and what it is, and clear away what a killed run's ranks have left."""
    if not world.is_main:
        return
    shutil.rmtree(folder / RANKS_FOLDER, ignore_errors=True)
    write_args(folder, asked)
    for note in asked.notes:
        get_logger().info("%s", note)
    get_logger().info("%s", describe(facts, folder, module, prunable))


def _engine(
    config: Config,
    opt: str,
    lr: float,
    accelerator: Accelerator,
    module: nn.Module,
    schedule: Schedule,
    steps_per_epoch: int,
    world: World,
) -> tuple[Engine, Any, ModelEmaV3 | None]:
    """The engine with model and optimizer in it, timm's learning-rate schedule, and the average of the weights."""
    optimizer = create_optimizer(config, module, opt, lr, schedule)
    keep_zeros(optimizer, module, config, schedule)
    scheduler, _ = create_schedule(config, optimizer, steps_per_epoch)
    engine = create_engine(config, opt, accelerator, module, optimizer, world)
    return engine, scheduler, _average(config, engine)


def _owners(engine: Engine, ema: nn.Module | None, teacher: Teacher | None, num_ranks: int) -> Owners:
    """Whose tensors the memory ledger counts. (The optimizer's state is looked up anew: a load replaces it.)"""
    return find_owners(
        engine.module,
        engine.optimizer_state,
        ema=ema,
        in_buckets=num_ranks > 1 and engine.name == "ddp",
        beside=engine.beside() | ({} if teacher is None else {"teacher": teacher.tensors()}),
    )


def _predict(
    config: Config, engine: Engine, num_classes: int, world: World, rank: int
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """See predict_run. Of another rank's share nothing is known here: its masks are its own."""
    if engine.name != "ddp" and rank != world.rank:
        return {}, {}
    return predict_run(config, engine, num_classes, world.num_ranks)


def _phases(config: Config, plan: Plan, schedule: Schedule) -> list[Phase]:
    warmup_steps = 0 if config.sched == "none" else config.warmup_epochs * plan.steps_per_epoch
    return plan_phases(plan.total_steps, warmup_steps, schedule)


def _plan(config: Config, loader: TrainLoader) -> Plan:
    return Plan(
        epochs=total_epochs(config, loader.steps),
        steps_per_epoch=loader.steps,
        accumulation=config.grad_accum_steps,
        global_batch_size=loader.global_batch_size,
        log_interval=config.log_interval,
        val_interval=config.val_interval,
        checkpoint_interval=config.checkpoint_interval,
        checkpoint_hist=config.checkpoint_hist,
        eval_metric=config.eval_metric,
        dist_bn=config.dist_bn,
        max_bad_images=config.max_bad_images,
    )
