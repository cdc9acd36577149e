"""Flags and YAML -> a frozen Config. Standard library and yaml only: `train.py --help` must not import torch.

One field is one flag: `weight_decay` is `--weight-decay` on the command line and `weight_decay` in a recipe. Names and
defaults are timm's wherever timm has the flag. Order of precedence: command line, recipe (`-c`), default.
"""

import dataclasses
from dataclasses import dataclass, fields
from typing import Any

from toolkit.config_rules import PRECISIONS, contradictions
from toolkit.errors import refuse
from toolkit.files import check_name
from toolkit.flag import check_value, flag, number_or_auto, whole_number

_TRACKERS = ("tensorboard", "wandb", "trackio", "none")


@dataclass(frozen=True)
class Config:
    """Every setting of a run. `given` holds the names that a flag or a recipe set, as opposed to defaults."""

    data_dir: str = flag("", "folder of WebDataset shards, or a URL prefix (http, hf, s3, gs, pipe:)", group="Data")
    train_split: str = flag("train", "split to train on")
    val_split: str = flag("validation", "split to evaluate on")
    shuffle_window: int | None = flag(
        None, "shards shuffled together (0: all); default all, from a URL 16", kind=int, within="[0, inf)"
    )
    shard_cache: str = flag("", "folder for shards from a URL; in the user's cache by default")
    shard_cache_gib: float = flag(50.0, "size of that folder at most, in GiB", within="(0, 1e9]")

    model: str = flag("resnet50", "any timm model by name", group="Model")
    pretrained: bool = flag(False, "start from timm's weights (fetched by timm)")
    initial_checkpoint: str = flag("", "start from the weights in this file, or of this run's or checkpoint's folder")
    num_classes: int | None = flag(None, "classes; the data set's number by default", kind=int, within="[1, inf)")
    img_size: int | None = flag(
        None, "side of the square input in pixels; the model's own by default", kind=int, within="[1, 65536]"
    )
    input_size: list[int] | None = flag(
        None, "channels, height and width of the input; instead of --img-size", kind=int, nargs=3, within="[1, 65536]"
    )
    in_chans: int | None = flag(None, "channels of the input: 3, or 1 for grey", kind=int, choices=(1, 3))
    crop_pct: float | None = flag(
        None, "share of the resized image the evaluation crop takes", kind=float, within="(0, 1]"
    )
    mean: list[float] | None = flag(
        None, "mean of each channel or of all, 0..1", kind=float, nargs="+", within="[0, 1]", counts=(1, 3)
    )
    std: list[float] | None = flag(
        None, "standard deviation of each channel or of all", kind=float, nargs="+", within="(0, 1]", counts=(1, 3)
    )
    interpolation: str = flag("", "evaluation resize; the model's own by default", choices=("", "bilinear", "bicubic"))
    model_kwargs: dict[str, Any] = flag({}, "more arguments of the model, key=value", nargs="*")
    gp: str | None = flag(None, "global pooling; the model's own by default", at_build=True)
    head_init_scale: float | None = flag(None, "factor of the new classifier's weights", kind=float, within="(0, inf)")
    head_init_bias: float | None = flag(None, "bias of the new classifier", kind=float, within="(-inf, inf)")
    fast_norm: bool = flag(False, "timm's norms in the low precision of --amp")
    batch_size: int = flag(128, "images per rank and micro-batch", short="-b", within="[1, inf)")
    validation_batch_size: int | None = flag(
        None, "images per rank in evaluation; as -b", kind=int, short="-vb", within="[1, inf)"
    )
    global_batch_size: int | None = flag(
        None, "fix ranks × batch × accumulation instead of -b", kind=int, within="[1, inf)"
    )
    channels_last: bool = flag(False, "channels-last memory layout")
    grad_checkpointing: bool = flag(False, "recompute activations in backward: less memory, about a third more time")
    fused_backward: bool = flag(False, "update each weight within backward, free its gradient: one rank, no clipping")
    auto_batch_size: str = flag("", "the largest batch per rank that is predicted to fit, e.g. 46GiB; instead of -b")
    grad_accum_steps: int = flag(1, "micro-batches per optimizer step", within="[1, inf)")
    torchcompile: str | None = flag(None, "compile the model, with this backend", nargs="?", const="inductor")
    torchcompile_mode: str | None = flag(
        None,
        "what inductor aims at",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    amp: str | None = flag(
        None,
        "mixed precision; bare: --amp-dtype, or fp16",
        nargs="?",
        const="default",
        choices=("default", "fp16", "bf16", "float16", "bfloat16"),
    )
    amp_dtype: str | None = flag(None, "dtype of a bare --amp", choices=("float16", "bfloat16"))
    model_dtype: str | None = flag(None, "of weights and gradients; without --amp", choices=("float32", "bfloat16"))

    opt: str = flag("sgd", "optimizer; python -m toolkit.optim --list shows ours, timm's work too", group="Optimizer")
    opt_eps: float | None = flag(None, "epsilon; the optimizer's own by default", kind=float, within="[0, inf)")
    opt_betas: list[float] | None = flag(
        None, "betas; the optimizer's own by default", kind=float, nargs="+", within="[0, 1)", counts=(2, 3)
    )
    momentum: float = flag(0.9, "momentum", within="[0, 1]")
    weight_decay: float = flag(
        2e-5, "weight decay; none on norms, biases and what the model exempts", within="[0, inf)"
    )
    clip_grad: float | None = flag(None, "clip gradients at this value", kind=float, within="(0, inf)")
    clip_mode: str = flag("norm", "what --clip-grad limits", choices=("norm", "value", "agc"))
    opt_foreach: bool | None = flag(None, "torch's update of many tensors at once, or one by one", kind=bool)
    layer_decay: float | None = flag(
        None, "factor of the learning rate from layer to layer, from the last one down", kind=float, within="(0, 1]"
    )
    layer_decay_min_scale: float = flag(0.0, "no layer's factor is smaller", within="[0, 1]")
    layer_decay_no_opt_scale: float | None = flag(
        None, "layers with a smaller factor are frozen", kind=float, within="[0, 1]"
    )
    opt_kwargs: dict[str, Any] = flag({}, "more arguments of the optimizer, key=value", nargs="*")

    pruning: str | None = flag(
        None, "method; adamwprune means state", group="Pruning", choices=("none", "magnitude", "movement", "state")
    )
    sparsity: float | None = flag(
        None,
        "final share of zeros in convolution and linear weights; 0 = off, N:M says its own",
        kind=float,
        within="[0, 1)",
    )
    prune_start: float = flag(0.0, "share of zeros before the first step, which the ramp goes on from", within="[0, 1)")
    prune_begin: float = flag(0.05, "where the ramp begins, as a fraction of all steps", within="[0, 1]")
    prune_end: float = flag(0.6, "where the last mask update is, as a fraction of all steps", within="[0, 1]")
    prune_frequency: int = flag(50, "steps between mask updates", within="[1, inf)")
    prune_score: str | None = flag(None, "score of a weight; the method's own by default")
    prune_scope: str = flag("global", "where weights or channels compete", choices=("global", "layer", "erk"))
    prune_pattern: str = flag("weight", "what goes together: weight, N:M as 2:4, or channel")
    prune_ends: bool = flag(False, "N:M: stem and classifier too, where it fits them")
    prune_channel_multiple: int = flag(1, "channel: each layer keeps a multiple of so many", within="[1, inf)")
    prune_shrink: bool = flag(False, "channel: after the last mask update go on with the smaller model")
    prune_config: dict[str, Any] | None = flag(
        None,
        "YAML file: regular expressions on names: skip, a sparsity, or options",
        kind=str,
        in_file=True,
    )
    prune_regrow: float = flag(
        0.0, "share of the survivors exchanged at an update; needs --pruning state", within="[0, 1)"
    )
    state_dtype: str | None = flag(
        None,
        "of the moments that --pruning state keeps, instead of --state-budget",
        choices=("float32", "bfloat16", "int8"),
    )
    state_budget: float | str | None = flag(
        None,
        "bytes that state pruning keeps for a prunable weight at most; auto where none is given",
        kind=number_or_auto,
        within="(0, inf)",
    )

    sched: str = flag(
        "cosine",
        "learning-rate schedule, timm's",
        group="Schedule",
        choices=("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau", "none"),
    )
    sched_on_updates: bool = flag(False, "step the schedule every update, not every epoch")
    lr: float | None = flag(None, "learning rate; overrides --lr-base", kind=float, within="[0, inf)")
    lr_base: float = flag(0.1, "learning rate at --lr-base-size images, scaled to the global batch", within="[0, inf)")
    lr_base_size: int = flag(256, "see --lr-base", within="[1, inf)")
    lr_base_scale: str = flag("", "scaling of --lr-base; sqrt for Adam, linear else", choices=("", "linear", "sqrt"))
    epochs: int = flag(300, "epochs to train", within="[1, inf)")
    warmup_lr: float = flag(1e-5, "learning rate at the start of warm-up", within="[0, inf)")
    warmup_epochs: int = flag(5, "epochs of warm-up", within="[0, inf)")
    warmup_prefix: bool = flag(False, "warm-up comes before the schedule instead of replacing its start")
    min_lr: float = flag(0.0, "lowest learning rate of a cyclic schedule", within="[0, inf)")
    cooldown_epochs: int = flag(0, "epochs at --min-lr after the schedule", within="[0, inf)")
    decay_epochs: float = flag(
        90.0, "epochs between decays of step; of the decay of wsd and rsqrt, below 1 a share", within="(0, inf)"
    )
    decay_milestones: list[int] = flag(
        [90, 180, 270], "epochs of the decays of multistep", kind=int, nargs="+", within="[0, inf)", ordered=True
    )
    decay_rate: float = flag(0.1, "factor of a decay; power of poly", short="--dr", within="(0, inf)")
    patience_epochs: int = flag(10, "epochs without gain before plateau decays", within="[0, inf)")
    lr_cycle_mul: float = flag(1.0, "factor from a cycle's length to the next", within="[1, inf)")
    lr_cycle_decay: float = flag(0.5, "factor of the learning rate from cycle to cycle", within="(0, 1]")
    lr_cycle_limit: int = flag(1, "cycles of cosine, tanh and poly; they add to --epochs", within="[1, inf)")
    lr_k_decay: float = flag(1.0, "k of cosine's and poly's k-decay", within="(0, inf)")
    lr_decay_fn: str | None = flag(
        None, "decay of wsd (1-sqrt) and rsqrt (linear)", choices=("linear", "1-sqrt", "cosine", "power", "exp")
    )
    lr_stable_timescale: float | None = flag(
        None, "time scale of rsqrt in epochs; as long as the warm-up", kind=float, within="(0, inf)"
    )
    lr_noise: list[float] | None = flag(
        None,
        "where noise on the learning rate begins, and ends, as shares of the schedule",
        kind=float,
        nargs="+",
        within="[0, 1]",
        counts=(1, 2),
        ordered=True,
    )
    lr_noise_pct: float = flag(0.67, "largest such noise, as a share of the learning rate", within="(0, 1]")
    lr_noise_std: float = flag(1.0, "its standard deviation", within="(0, inf)")

    no_aug: bool = flag(False, "train on evaluation crops", group="Augmentation and regularisation")
    scale: list[float] = flag(
        [0.08, 1.0], "area of the random crop", kind=float, nargs=2, within="(0, 1]", ordered=True
    )
    ratio: list[float] = flag(
        [3.0 / 4.0, 4.0 / 3.0], "aspect ratio of the random crop", kind=float, nargs=2, within="(0, inf)", ordered=True
    )
    train_crop_mode: str | None = flag(
        None, "random resized crop (default), or resize keeping the ratio and crop", choices=("rrc", "rkrc", "rkrr")
    )
    hflip: float = flag(0.5, "chance of a left-right flip", within="[0, 1]")
    vflip: float = flag(0.0, "chance of an upside-down flip", within="[0, 1]")
    color_jitter: float = flag(
        0.4, "strength of colour jitter; anything above 0 leaves the fast decoding path", within="[0, inf)"
    )
    color_jitter_prob: float | None = flag(None, "chance of colour jitter, 1 by default", kind=float, within="[0, 1]")
    grayscale_prob: float | None = flag(None, "chance of a grey image", kind=float, within="[0, 1]")
    gaussian_blur_prob: float | None = flag(None, "chance of a blurred image", kind=float, within="[0, 1]")
    aug_repeats: int = flag(
        0, "copies of an image in a global batch, augmented anew; steps stay", kind=whole_number, within="[0, 256]"
    )
    aa: str | None = flag(None, "AutoAugment policy, timm's, for example rand-m9-mstd0.5", at_build=True)
    train_interpolation: str = flag("random", "resize of training crops", choices=("random", "bilinear", "bicubic"))
    reprob: float = flag(0.0, "chance of random erasing", within="[0, 1]")
    remode: str = flag("pixel", "fill of random erasing", choices=("const", "rand", "pixel"))
    recount: int = flag(1, "areas erased", within="[1, inf)")
    mixup: float = flag(0.0, "mixup alpha", within="[0, inf)")
    cutmix: float = flag(0.0, "cutmix alpha", within="[0, inf)")
    cutmix_minmax: list[float] | None = flag(
        None, "cutmix min and max ratio", kind=float, nargs="+", within="[0, 1]", counts=(2,), ordered=True
    )
    mixup_prob: float = flag(1.0, "chance of mixup or cutmix in a batch", within="[0, 1]")
    mixup_switch_prob: float = flag(0.5, "chance of cutmix where both are on", within="[0, 1]")
    mixup_mode: str = flag("batch", "how pairs are mixed", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = flag(0, "stop mixing after this epoch; 0 = never", within="[0, inf)")
    smoothing: float = flag(0.1, "label smoothing", within="[0, 1)")
    bce_loss: bool = flag(False, "binary cross-entropy")
    bce_target_thresh: float | None = flag(None, "threshold of soft targets in --bce-loss", kind=float, within="[0, 1]")
    bce_sum: bool = flag(False, "--bce-loss is summed over the classes")
    bce_pos_weight: float | None = flag(None, "weight of positives in --bce-loss", kind=float, within="(0, inf)")
    kd_model_name: str | None = flag(None, "teacher: a timm model whose scores are learned as well")
    kd_checkpoint: str = flag("", "the teacher's weights: a file, or a run's or checkpoint's folder; else timm's")
    kd_temperature: float = flag(4.0, "both models' scores are divided by it", within="(0, inf)")
    distill_loss_weight: float | None = flag(
        None, "weight of the teacher's loss; 1, or 1 - --task-loss-weight", kind=float, within="[0, inf)"
    )
    task_loss_weight: float | None = flag(
        None, "weight of the labels' loss beside a teacher's; 1 by default", kind=float, within="[0, inf)"
    )
    drop: float = flag(0.0, "dropout", within="[0, 1)")
    drop_path: float | None = flag(None, "stochastic depth", kind=float, within="[0, 1)")
    drop_block: float | None = flag(None, "drop-block, where the model has it", kind=float, within="[0, 1)")

    bn_momentum: float | None = flag(
        None, "of BatchNorm's statistics", kind=float, within="(0, 1]", group="BatchNorm and weight averaging"
    )
    bn_eps: float | None = flag(None, "epsilon of BatchNorm", kind=float, within="(0, 1]")
    sync_bn: bool = flag(False, "BatchNorm statistics over all ranks")
    dist_bn: str = flag("reduce", "running statistics after an epoch", choices=("reduce", "broadcast", ""))
    model_ema: bool = flag(False, "keep a moving average of the weights, and evaluate it")
    model_ema_decay: float = flag(0.9998, "decay of the average", within="[0, 1]")
    model_ema_warmup: bool = flag(False, "raise the decay over the first steps")

    seed: int = flag(42, "seed", group="Run", within="[0, 4294967295]")
    log_interval: int = flag(50, "steps between log lines and scalars", within="[1, inf)")
    report_to: list[str] = flag(["tensorboard"], "where scalars go", kind=str, nargs="+", choices=_TRACKERS)
    val_interval: int = flag(1, "epochs between evaluations", within="[1, inf)")
    checkpoint_hist: int = flag(10, "checkpoints kept beside the best", within="[0, inf)")
    checkpoint_interval: int = flag(
        0, "steps between checkpoints within an epoch; 0 = at its end only", within="[0, inf)"
    )
    workers: int = flag(4, "data workers per rank", short="-j", within="[0, 1024]")
    pin_mem: bool = flag(False, "pin host memory for faster copies to the GPU")
    output: str = flag("runs", "folder of run folders")
    experiment: str = flag("", "name of the run folder; <time>-<model>-<opt> by default")
    eval_metric: str = flag("top1", "metric of the best checkpoint", choices=("top1", "top5", "loss"))
    resume: str = flag("", "'auto' (newest checkpoint of the run folder) or a checkpoint folder")
    max_bad_images: float = flag(
        1e-4, "share of unreadable images above which a run stops (ten are always let by)", within="[0, 1]"
    )
    dist_timeout: int = flag(1800, "seconds before a rank that waits for a lost one gives up", within="[1, inf)")
    given: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()  # what the run's log is to say of the flags and recipe it was given

    def __post_init__(self) -> None:
        if self.experiment:
            check_name(self.experiment, "--experiment")
        for item in flags():
            value = getattr(self, item.name)
            if value is not None:
                check_value(item, value)
        refuse(contradictions(self))

    @property
    def mixed_precision(self) -> str:
        """Accelerate's word for the precision: no, fp16 or bf16."""
        if not self.amp:
            return "no"
        return PRECISIONS[(self.amp_dtype or "float16") if self.amp == "default" else self.amp]

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return self.input_size[0] if self.input_size else self.in_chans or 3

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of the input; None: the model's own."""
        if self.input_size:
            return self.input_size[1], self.input_size[2]
        return None if self.img_size is None else (self.img_size, self.img_size)

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is on, so that targets are soft."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def to_dict(self) -> dict[str, Any]:
        """All settings, for args.yaml; reading it back with -c repeats the run."""
        return {item.name: getattr(self, item.name) for item in flags()}


def flags() -> list[dataclasses.Field[Any]]:
    """The fields that are flags."""
    return [item for item in fields(Config) if item.name not in ("given", "notes")]
