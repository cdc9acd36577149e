"""The optimizer by name: pruning options, parameter groups, learning rate."""

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import Tensor, nn

from toolkit.builder.data import example_input
from toolkit.config import Config
from toolkit.errors import blaming, refuse
from toolkit.log import get_logger
from toolkit.optim.param_groups import param_groups
from toolkit.optim.registry import OptimizerSpec, check_optimizer_name, find_spec, resolve_name
from toolkit.prune.options import PruningOptions
from toolkit.prune.patterns import CHANNEL, WEIGHT, n_of_m, sparsity_of
from toolkit.prune.rules import own_options, prunable_by_rules
from toolkit.prune.schedule import PartsSchedule, Schedule

_log = get_logger()


def resolve_optimizer(config: Config) -> tuple[str, str]:
    """Name in timm's factory and pruning method; checks that they and --sparsity fit together."""
    name, method = resolve_name(config.opt, config.pruning)
    check_optimizer_name(name)
    bare, prunes = name.removeprefix("lookahead_"), method != "none"
    info = get_optimizer_info(bare)
    betas = info.num_betas if info.has_betas else 0
    floats = config.state_dtype == "float32" and config.model_dtype != "bfloat16"  # as every optimizer keeps
    refuse(
        {
            "needs second derivatives, which backward does not keep the graph for": info.second_order,
            "compiles parts of itself at the first step, which the memory probe watches and breaks": (
                bare in ("kron", "kronc", "kronw")
            ),
        },
        f"--opt {config.opt} cannot train here: it {{}}; choose another, --help lists them",
    )
    refuse(
        {
            f"--opt-betas: --opt {name} takes {betas or 'none'}; give as many, or leave the flag out": (
                config.opt_betas is not None and len(config.opt_betas) != betas
            ),
            f"--opt {config.opt} with pruning by {method} needs --sparsity, for example --sparsity 0.7 (0 = off)": (
                prunes and config.sparsity is None and n_of_m(config.prune_pattern) is None
            ),
            f"--prune-pattern {config.prune_pattern} but --opt {config.opt} does not prune; add --pruning magnitude, "
            "movement or state, or use --opt adamwprune": config.prune_pattern != WEIGHT and not prunes,
            f"--prune-start {config.prune_start} but --opt {config.opt} does not prune; add --pruning magnitude, "
            "movement or state, or use --opt adamwprune": config.prune_start and not prunes,
            f"--prune-start {config.prune_start} is for single weights, and at most the --sparsity of the end; lower "
            "it, or leave it out": not config.prune_config
            and (config.prune_pattern != WEIGHT or config.prune_start > (config.sparsity or 0))
            and config.prune_start,
            f"--prune-config but --opt {config.opt} does not prune; add --pruning magnitude, movement or state, or use "
            "--opt adamwprune": config.prune_config and not prunes,
            "--state-budget auto with --prune-config: the end has no one sparsity; give bytes a weight": (
                config.prune_config and config.state_budget == "auto"
            ),
            f"--prune-shrink removes whole channels; add --prune-pattern {CHANNEL}": (
                config.prune_shrink and not (prunes and config.prune_pattern == CHANNEL)
            ),
            f"--state-dtype {config.state_dtype}: --opt {config.opt} decides by itself; use --opt adamwprune or "
            "--pruning state": config.state_dtype is not None and method != "state" and not floats,
            f"--state-budget {config.state_budget}: --opt {config.opt} keeps what it keeps; use --opt adamwprune or "
            "--pruning state": config.state_budget is not None and method != "state",
            f"--state-budget {config.state_budget} chooses the dtype of the moments; drop --state-dtype": (
                config.state_budget is not None and config.state_dtype is not None
            ),
            f"--opt {name}: Lookahead revives pruned weights, its slow weights know no mask; use --opt {bare}": (
                prunes and bare != name
            ),
            f"--sparsity {config.sparsity} but --opt {config.opt} does not prune; add --pruning magnitude, movement "
            "or state, or use --opt adamwprune": config.sparsity and config.pruning is None and not prunes,
        }
    )
    with blaming(f"--prune-pattern {config.prune_pattern}", "see docs/optimizers.md"):
        final_sparsity(config, method)
    return name, method


def final_sparsity(config: Config, method: str) -> float:
    """--sparsity, or what --prune-pattern N:M says; 0 without a method. Raises ValueError where they differ."""
    return 0.0 if method == "none" else sparsity_of(config.prune_pattern, config.sparsity)


def with_state_budget(config: Config) -> Config:
    """--state-budget auto where state pruning is on and nothing is said of its moments; else `config` as it is.

    An optimizer made by hand keeps float32, so that sparsity 0 is AdamW bit for bit. Here the peak decides what fits,
    and the photo study found no loss at 70 % (results/cifar10). Rules of --prune-config have no one sparsity to
    take a budget from; beside weights in bfloat16 moments are bfloat16.
    """
    method = resolve_name(config.opt, config.pruning)[1]
    apart = _told_of_moments(config) or config.prune_config or config.model_dtype == "bfloat16"
    if method != "state" or apart or not (config.sparsity or n_of_m(config.prune_pattern)):
        return config
    return dataclasses.replace(config, state_budget="auto")


def _told_of_moments(config: Config) -> bool:
    given = {"state_dtype", "state_budget"} & config.opt_kwargs.keys()
    return bool(config.state_dtype or config.state_budget or given)


def moments_beside(config: Config, spec: OptimizerSpec | None) -> str | None:
    """bfloat16 beside weights in bfloat16 where nothing is said of our moments: without a dtype for them weights would
    be rounded to the nearest.
    """
    half = config.model_dtype == "bfloat16" and not _told_of_moments(config)
    return "bfloat16" if half and spec is not None and spec.keeps_state_dtype else None


def apply_recipe(config: Config, opt: str) -> Config:
    """Settings that belong to an optimizer (see its registry row) unless a flag or recipe file says otherwise."""
    spec = find_spec(opt)
    extra = {key: value for key, value in (spec.recipe if spec else {}).items() if key not in config.given}
    if extra:
        _log.info("--opt %s brings %s", opt, ", ".join(f"{key}={value}" for key, value in extra.items()))
    return dataclasses.replace(config, **extra)


def base_learning_rate(config: Config, opt: str, global_batch_size: int) -> float:
    """timm's rule: --lr, or --lr-base scaled from --lr-base-size to the global batch."""
    if config.lr is not None:
        return config.lr
    ratio = global_batch_size / config.lr_base_size
    scale = config.lr_base_scale or ("sqrt" if any(part in opt for part in ("ada", "lamb")) else "linear")
    return config.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def create_schedule(config: Config, optimizer: torch.optim.Optimizer, steps: int) -> tuple[Any, int]:
    """timm's schedule of the learning rate, and the epochs it counts. Raises ValueError where it does not fit them."""
    remedy = "see --epochs, --warmup-epochs, --decay-epochs (below 1: a share) and --lr-stable-timescale"
    with blaming(f"--sched {config.sched}", remedy):
        return create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=steps)


def total_epochs(config: Config, steps: int) -> int:
    """Epochs with cool-down, warm-up prefix and cycles, as timm's scheduler factory counts them."""
    if config.warmup_epochs >= config.epochs and not config.warmup_prefix:
        _log.info(
            "the learning rate does not get to --lr within the run: --warmup-epochs %g of --epochs %d; lower it",
            config.warmup_epochs,
            config.epochs,
        )
    return create_schedule(config, torch.optim.SGD([torch.zeros(1)], lr=1.0), steps)[1]


def pruning_schedule(config: Config, method: str, total_steps: int) -> Schedule:
    """The --prune flags as optimizer steps; off without a method or with --sparsity 0."""
    sparsity = final_sparsity(config, method)
    if not sparsity:
        return Schedule()
    begin, end = int(config.prune_begin * total_steps), round(config.prune_end * total_steps)
    if not begin < end:
        raise ValueError(f"a run of {total_steps} steps is too short to prune in; raise --epochs")
    if config.prune_frequency >= end - begin:
        _log.info(
            "the masks change once, at step %d: --prune-frequency %d leaves no other update from step %d on; lower it",
            end,
            config.prune_frequency,
            begin,
        )
    return Schedule(sparsity, begin, end, config.prune_frequency, config.prune_pattern)


def create_optimizer(
    config: Config, model: nn.Module, opt: str, lr: float, schedule: Schedule
) -> torch.optim.Optimizer:
    """The optimizer from timm's factory, with our groups and pruning options. Raises ValueError on a bad argument."""
    arguments = {**optimizer_kwargs(config), "opt": opt, "lr": lr, **config.opt_kwargs}
    spec = find_spec(opt)
    if spec is not None and spec.method != "none":
        given = {"score": config.prune_score, "scope": config.prune_scope, "regrow": config.prune_regrow}
        given["channel_multiple"] = config.prune_channel_multiple
        given |= dataclasses.asdict(schedule)
        moments = {"state_dtype": config.state_dtype, "state_budget": config.state_budget}
        given |= {key: value for key, value in moments.items() if value is not None and spec.method == "state"}
        clash = sorted(config.opt_kwargs.keys() & given)
        if clash:
            raise ValueError(f"--opt-kwargs {clash[0]} is set by the --prune flags here; use them instead")
        arguments |= given
    if beside := moments_beside(config, spec):
        arguments["state_dtype"] = beside
    if config.model_dtype == "bfloat16" and not (spec is not None and spec.keeps_state_dtype):
        _log.info(
            "--model-dtype bfloat16: %s rounds weights to the nearest, so updates below half an ulp are lost; "
            "adamwprune, sgdprune and plain adamwspam round them by chance",
            opt,
        )
    remedy = "see --opt-kwargs, --opt-betas, --opt-eps and --opt-foreach"
    with blaming(f"--opt {opt} does not take one of its arguments", remedy):
        return create_optimizer_v2(model, **arguments, param_group_fn=partial(_groups, config, schedule.pattern))


def _groups(config: Config, pattern: str, model: nn.Module) -> list[dict[str, Any]]:
    image = None
    if pattern == CHANNEL:
        image = example_input(config, model)
    scales = layer_scales(config, model)
    return param_groups(
        model,
        config.weight_decay,
        pattern=pattern,
        ends=config.prune_ends,
        example_input=image,
        lr_scales=scales,
        rules=config.prune_config,
    )


def layer_scales(config: Config, model: nn.Module) -> dict[str, float]:
    """--layer-decay: factor of the learning rate by parameter's name, timm's; layers below -no-opt-scale are frozen."""
    if config.layer_decay is None:
        return {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(
        model,
        layer_decay=config.layer_decay,
        min_scale=config.layer_decay_min_scale,
        no_opt_scale=config.layer_decay_no_opt_scale,
    )
    return {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}


def prunable_weights(model: nn.Module, config: Config) -> list[tuple[str, Tensor]]:
    """The weights that pruning counts: frozen ones the optimizer does not see, and leaves alone."""
    names = own_rules(model, config)
    return [(name, weight) for name, weight in model.named_parameters() if name in names and weight.requires_grad]


def own_rules(model: nn.Module, config: Config) -> dict[str, dict[str, Any]]:
    """Each prunable weight's name -> what --prune-config says of it."""
    with blaming("--prune-config", "see docs/optimizers.md"):
        return prunable_by_rules(model, config.prune_config, config.prune_pattern, ends=config.prune_ends)


def goal_of(config: Config, schedule: Schedule, model: nn.Module) -> Schedule:
    """The schedule of all that is pruned, --prune-config's parts together. Raises ValueError where one cannot be."""
    own, weights = own_rules(model, config), dict(prunable_weights(model, config))
    if not any(own.values()):
        return schedule
    sizes: Counter[tuple[Any, ...]] = Counter()
    for name, weight in weights.items():
        sizes[tuple(sorted(own[name].items()))] += weight.numel()
    with blaming("--prune-config", "see docs/optimizers.md"):
        whole = PruningOptions(**dataclasses.asdict(schedule))
        return PartsSchedule.of([(own_options(whole, dict(options)), size) for options, size in sizes.items()])


def keep_zeros(optimizer: torch.optim.Optimizer, model: nn.Module, config: Config, schedule: Schedule) -> None:
    """Have a pruned --initial-checkpoint stay pruned, from the first step on; make --prune-start's zeros."""
    if config.initial_checkpoint and schedule.enabled:
        _keep_zeros_of_start(optimizer, model, config, schedule)
    if config.prune_start:
        with blaming(f"--prune-start {config.prune_start}", "see docs/optimizers.md"):
            optimizer.pruning.start_sparse(config.prune_start)  # type: ignore[attr-defined]
        zeros, weights = optimizer.pruning.sparsity()  # type: ignore[attr-defined]
        _log.info("--prune-start: %d of %d prunable weights are 0 from the first step on", zeros, weights)


def _keep_zeros_of_start(
    optimizer: torch.optim.Optimizer, model: nn.Module, config: Config, schedule: Schedule
) -> None:
    if schedule.pattern == CHANNEL:  # they are whole channels only where pruning by channels has made them
        _log.info("%s: zeros in it are weights like others, until their channels are pruned", config.initial_checkpoint)
        return
    weights = [weight for _, weight in prunable_weights(model, config)]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    if zeros:
        optimizer.pruning.keep_zeros()  # type: ignore[attr-defined]
        _log.info(
            "%s: its %d zeros among %d prunable weights stay zeros",
            config.initial_checkpoint,
            zeros,
            sum(weight.numel() for weight in weights),
        )
