"""The one place where the configuration meets the components: Config -> Run."""

import dataclasses
import shutil
from functools import partial
from typing import Any

from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

import toolkit.optim  # noqa: F401  registers our optimizers
from toolkit.builder.accelerator import autocast, create_sharding
from toolkit.builder.batch import confirm_batch_size, predict_peaks, with_automatic_batch_size
from toolkit.builder.data import augment, create_loaders, input_settings, open_data, to_inputs
from toolkit.builder.metadata import describe, run_facts, write_args
from toolkit.builder.model import compile_model, create_model, place_model, train_loss
from toolkit.builder.optimizer import (
    apply_recipe,
    base_learning_rate,
    create_optimizer,
    fused_backward,
    keep_zeros,
    predict_memory,
    pruning_schedule,
    resolve_optimizer,
    total_epochs,
)
from toolkit.builder.process import check_identity, create_accelerator, run_folder, seed_everything, seed_rank
from toolkit.config import Config, batch_size_per_rank
from toolkit.data.loader import TrainLoader
from toolkit.dist import World
from toolkit.engine.checkpoint import CheckpointStore, step_of
from toolkit.engine.run import Plan, Run
from toolkit.engine.scalars import Scalars
from toolkit.log import get_logger
from toolkit.memory.ledger import find_owners
from toolkit.memory.phases import plan_phases
from toolkit.memory.recorder import RANKS_FOLDER, MemoryLog
from toolkit.prune.groups import prunable_names

__all__ = ["build"]


def build(config: Config) -> Run:
    """Make every component of a run. Raises ValueError, one line with value, rule and remedy, for what cannot be."""
    opt, method = resolve_optimizer(config)
    given, config = config, apply_recipe(config, opt)
    data = open_data(config)
    accelerator = create_accelerator(config)
    world = World.detect(accelerator.device)
    memory = MemoryLog(world)
    automatic = bool(config.auto_batch_size)
    config = with_automatic_batch_size(config, data.num_classes, len(data.train), world.num_ranks)
    given = dataclasses.replace(given, batch_size=config.batch_size, auto_batch_size="") if automatic else given
    seed_everything(config.seed)

    model = create_model(config, data.num_classes)
    inputs = input_settings(config, model)
    train_loader, eval_loader = create_loaders(config, data, inputs, world)
    place_model(model, config, world)
    if automatic:
        confirm_batch_size(model, config, inputs["input_size"], world.device)
    ema = ModelEmaV3(model, config.model_ema_decay, use_warmup=config.model_ema_warmup) if config.model_ema else None
    lr = base_learning_rate(config, opt, train_loader.global_batch_size)
    plan = _plan(config, total_epochs(config, train_loader.steps), train_loader)
    schedule = pruning_schedule(config, method, plan.total_steps)
    optimizer = create_optimizer(config, model, opt, lr, schedule)
    keep_zeros(optimizer, model, config, schedule)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=train_loader.steps)
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    sharding = create_sharding(accelerator, prepared_model, model, prepared_optimizer, optimizer, world)

    folder, resume_from, lock = run_folder(given, opt, world)
    facts = run_facts(config, data, opt, method, schedule, plan, world)
    facts |= {"lr": lr, "weight_decay": config.weight_decay}
    prunable = prunable_names(model)
    if resume_from is not None:
        check_identity(resume_from, facts, folder, world)
    seed_rank(config.seed, world.rank)
    if world.is_main:
        shutil.rmtree(folder / RANKS_FOLDER, ignore_errors=True)  # of a run that was killed here
        write_args(folder, given)
        get_logger().info("%s", describe(facts, lr, folder, model, prunable))
    memory.begin(
        lambda: find_owners(
            model, optimizer.state, ema=ema, in_buckets=world.num_ranks > 1
        ),  # state: a load replaces it
        plan_phases(plan.total_steps, _warmup_steps(config, train_loader), schedule),
        folder,
    )
    return Run(
        plan=plan,
        accelerator=accelerator,
        sharding=sharding,
        autocast=lambda: autocast(accelerator, config, world.device),
        world=world,
        folder=folder,
        lock=lock,
        model=compile_model(prepared_model, config),
        bare_model=model,
        optimizer=prepared_optimizer,
        bare_optimizer=optimizer,
        fused=fused_backward(config, optimizer, opt, schedule, world),
        scheduler=scheduler,
        ema=ema,
        train_loader=train_loader,
        eval_loader=eval_loader,
        train_loss=train_loss(config),
        to_inputs=to_inputs(inputs, model, config.channels_last),
        augment=augment(config, world, facts["num_classes"]),
        schedule=schedule,
        prunable=[(name, parameter) for name, parameter in model.named_parameters() if name in prunable],
        predict_memory=partial(_predict, config, model, optimizer, opt, method, ema, facts, sharding.name),
        checkpoints=CheckpointStore(folder / "checkpoints", world, config.checkpoint_hist),
        scalars=Scalars(folder / "tb", world, step_of(resume_from) if resume_from else 0),
        memory=memory,
        facts=facts,
        resume_from=resume_from,
    )


def _warmup_steps(config: Config, loader: TrainLoader) -> int:
    return 0 if config.sched == "none" else config.warmup_epochs * loader.steps


def _predict(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    opt: str,
    method: str,
    ema: Any,
    facts: dict[str, Any],
    engine: str,
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Ledger rows at the end, and those of the peaks; empty for FSDP2 and ZeRO, whose shares are not predicted."""
    if engine != "ddp":
        return {}, {}
    ranks = facts["world_size"]
    return (
        predict_memory(model, optimizer, opt, method, config, ema, ranks),
        predict_peaks(config, batch_size_per_rank(config, ranks), facts["num_classes"], ranks),
    )


def _plan(config: Config, epochs: int, loader: TrainLoader) -> Plan:
    return Plan(
        epochs=epochs,
        steps_per_epoch=loader.steps,
        accumulation=config.grad_accum_steps,
        global_batch_size=loader.global_batch_size,
        clip_grad=config.clip_grad,
        clip_mode=config.clip_mode,
        log_interval=config.log_interval,
        val_interval=config.val_interval,
        checkpoint_interval=config.checkpoint_interval,
        eval_metric=config.eval_metric,
        dist_bn=config.dist_bn,
        max_bad_images=config.max_bad_images,
    )
