"""Which flags contradict each other. Standard library only, as toolkit.config, which asks this of every Config."""

from typing import Any

PRECISIONS = {"float16": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16"}


def contradictions(config: Any) -> dict[str, object]:
    """What is wrong with a Config, with the remedy -> whether it holds. (Its type would be a circle of imports.)"""
    return {
        f"--input-size {config.input_size} has {config.channels} channels; images are read with 3, or 1 for grey": (
            config.channels not in (1, 3)
        ),
        f"--in-chans {config.in_chans} is not the first of --input-size {config.input_size}; leave it out": (
            config.in_chans not in (None, config.channels)
        ),
        "--img-size and --input-size both set the input; keep one of them": (
            config.img_size is not None and config.input_size is not None
        ),
        f"--mean and --std need as many values as there are channels, or one: {config.channels}": any(
            values is not None and len(values) not in (1, config.channels) for values in (config.mean, config.std)
        ),
        f"--torchcompile-mode {config.torchcompile_mode} is inductor's; give it with a bare --torchcompile": (
            config.torchcompile_mode and config.torchcompile != "inductor"
        ),
        "--layer-decay reaches the optimizer through a schedule; use --sched constant instead of none": (
            config.layer_decay is not None and config.sched == "none"
        ),
        f"--prune-begin {config.prune_begin} and --prune-end {config.prune_end} are fractions of all steps; use "
        "0 <= begin < end <= 1": not 0 <= config.prune_begin < config.prune_end <= 1,
        f"--amp-dtype {config.amp_dtype} does nothing without --amp; add --amp or drop it": (
            config.amp_dtype and not config.amp
        ),
        f"--amp {config.amp} and --amp-dtype {config.amp_dtype} disagree; keep one of them": (
            config.amp_dtype and config.mixed_precision != PRECISIONS[config.amp_dtype]
        ),
        "--sched plateau looks at each epoch's metric; drop --sched-on-updates": (
            config.sched == "plateau" and config.sched_on_updates
        ),
        f"--prune-end {config.prune_end} with --amp fp16: steps that the gradient scaler skips put the last mask "
        "update behind the end; use --prune-end 0.9 or less, or --amp bf16": (
            config.mixed_precision == "fp16" and config.sparsity and config.prune_end > 0.9
        ),
        "--report-to none goes with no other; leave one of them out": (
            "none" in config.report_to and len(config.report_to) > 1
        ),
        "-b and --global-batch-size both set the batch; keep one of them": (
            config.global_batch_size is not None and "batch_size" in config.given
        ),
        "--kd-checkpoint, --distill-loss-weight, --task-loss-weight are a teacher's; name one with --kd-model-name": (
            not config.kd_model_name
            and (config.kd_checkpoint or (config.distill_loss_weight, config.task_loss_weight) != (None, None))
        ),
        f"--task-loss-weight {config.task_loss_weight} leaves the teacher less than nothing; use at most 1, or give "
        "--distill-loss-weight as well": config.distill_loss_weight is None and (config.task_loss_weight or 0) > 1,
    }
