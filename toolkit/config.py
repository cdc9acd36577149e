"""Flags and YAML -> a frozen Config. Standard library and yaml only: `train.py --help` must not import torch.

One field is one flag: `weight_decay` is `--weight-decay` on the command line and `weight_decay` in a recipe. Names and
defaults are timm's wherever timm has the flag. Order of precedence: command line, recipe (`-c`), default.
"""

import dataclasses
import re
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from toolkit.errors import refuse
from toolkit.files import check_name

_PRECISIONS = {"float16": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16"}


def number_or_auto(text: Any) -> float | str:
    """A flag's value that is a number, or the word auto. Raises ValueError."""
    return "auto" if text == "auto" else float(text)


def _flag(default: Any, help_text: str, **options: Any) -> Any:
    """A field with its flag's help.

    Options: group (once, at its first flag), kind, nargs, const, choices, short; and what `_check_value` holds a value
    against: within (an interval), counts (of values that nargs="+" may have), ordered; at_build: timm judges the text.
    """
    kind: Any = str if default is None else type(default)
    metadata = {"help": help_text, "default": default, "kind": kind, **options}
    if isinstance(default, (list, dict)):
        return field(default_factory=partial(kind, default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Every setting of a run. `given` holds the names that a flag or a recipe set, as opposed to defaults."""

    data_dir: str = _flag("", "folder of WebDataset shards, or a URL prefix (http, hf, s3, gs, pipe:)", group="Data")
    train_split: str = _flag("train", "split to train on")
    val_split: str = _flag("validation", "split to evaluate on")
    shuffle_window: int | None = _flag(
        None, "shards shuffled together (0: all); default all, from a URL 16", kind=int, within="[0, inf)"
    )
    shard_cache: str = _flag("", "folder for shards from a URL; in the user's cache by default")
    shard_cache_gib: float = _flag(50.0, "size of that folder at most, in GiB", within="(0, 1e9]")

    model: str = _flag("resnet50", "any timm model by name", group="Model")
    pretrained: bool = _flag(False, "start from timm's weights (fetched by timm)")
    initial_checkpoint: str = _flag("", "start from the weights in this file, or of this run's or checkpoint's folder")
    num_classes: int | None = _flag(None, "classes; the data set's number by default", kind=int, within="[1, inf)")
    img_size: int | None = _flag(
        None, "side of the square input in pixels; the model's own by default", kind=int, within="[1, 65536]"
    )
    crop_pct: float | None = _flag(
        None, "share of the resized image the evaluation crop takes", kind=float, within="(0, 1]"
    )
    mean: list[float] | None = _flag(None, "per-channel mean, 0..1", kind=float, nargs=3, within="[0, 1]")
    std: list[float] | None = _flag(None, "per-channel standard deviation, 0..1", kind=float, nargs=3, within="(0, 1]")
    interpolation: str = _flag("", "evaluation resize; the model's own by default", choices=("", "bilinear", "bicubic"))
    model_kwargs: dict[str, Any] = _flag({}, "more arguments of the model, key=value", nargs="*")
    batch_size: int = _flag(128, "images per rank and micro-batch", short="-b", within="[1, inf)")
    validation_batch_size: int | None = _flag(
        None, "images per rank in evaluation; as -b", kind=int, short="-vb", within="[1, inf)"
    )
    global_batch_size: int | None = _flag(
        None, "fix ranks × batch × accumulation instead of -b", kind=int, within="[1, inf)"
    )
    channels_last: bool = _flag(False, "channels-last memory layout")
    grad_checkpointing: bool = _flag(False, "recompute activations in backward: less memory, about a third more time")
    fused_backward: bool = _flag(False, "update each weight within backward, free its gradient: one rank, no clipping")
    auto_batch_size: str = _flag("", "the largest batch per rank that is predicted to fit, e.g. 46GiB; instead of -b")
    grad_accum_steps: int = _flag(1, "micro-batches per optimizer step", within="[1, inf)")
    torchcompile: str | None = _flag(None, "compile the model, with this backend", nargs="?", const="inductor")
    amp: str | None = _flag(
        None,
        "mixed precision; bare: --amp-dtype, or fp16",
        nargs="?",
        const="default",
        choices=("default", "fp16", "bf16", "float16", "bfloat16"),
    )
    amp_dtype: str | None = _flag(None, "dtype of a bare --amp", choices=("float16", "bfloat16"))

    opt: str = _flag("sgd", "optimizer; python -m toolkit.optim --list shows ours, timm's work too", group="Optimizer")
    opt_eps: float | None = _flag(None, "epsilon; the optimizer's own by default", kind=float, within="[0, inf)")
    opt_betas: list[float] | None = _flag(
        None, "betas; the optimizer's own by default", kind=float, nargs="+", within="[0, 1)", counts=(2, 3)
    )
    momentum: float = _flag(0.9, "momentum", within="[0, 1]")
    weight_decay: float = _flag(
        2e-5, "weight decay; none on norms, biases and what the model exempts", within="[0, inf)"
    )
    clip_grad: float | None = _flag(None, "clip gradients at this value", kind=float, within="(0, inf)")
    clip_mode: str = _flag("norm", "what --clip-grad limits", choices=("norm", "value", "agc"))
    opt_kwargs: dict[str, Any] = _flag({}, "more arguments of the optimizer, key=value", nargs="*")

    pruning: str | None = _flag(
        None, "method; adamwprune means state", group="Pruning", choices=("none", "magnitude", "movement", "state")
    )
    sparsity: float | None = _flag(
        None,
        "final share of zeros in convolution and linear weights; 0 = off, N:M says its own",
        kind=float,
        within="[0, 1)",
    )
    prune_begin: float = _flag(0.05, "where the ramp begins, as a fraction of all steps", within="[0, 1]")
    prune_end: float = _flag(0.6, "where the last mask update is, as a fraction of all steps", within="[0, 1]")
    prune_frequency: int = _flag(50, "steps between mask updates", within="[1, inf)")
    prune_score: str | None = _flag(None, "score of a weight; the method's own by default")
    prune_scope: str = _flag("global", "where weights compete", choices=("global", "layer", "erk"))
    prune_pattern: str = _flag("weight", "what goes together: weight, N:M as 2:4, or channel")
    prune_ends: bool = _flag(False, "N:M: stem and classifier too, where it fits them")
    prune_shrink: bool = _flag(False, "channel: after the last mask update go on with the smaller model")
    prune_regrow: float = _flag(
        0.0, "share of the survivors exchanged at an update; needs --pruning state", within="[0, 1)"
    )
    state_dtype: str | None = _flag(
        None,
        "of the moments that --pruning state keeps; the weights' own by default",
        choices=("float32", "bfloat16", "int8"),
    )
    state_budget: float | str | None = _flag(
        None,
        "bytes that state pruning keeps for a prunable weight at most, or auto; the moments' dtype follows",
        kind=number_or_auto,
        within="(0, inf)",
    )

    sched: str = _flag(
        "cosine",
        "learning-rate schedule, timm's",
        group="Schedule",
        choices=("cosine", "tanh", "step", "multistep", "poly", "plateau", "none"),
    )
    sched_on_updates: bool = _flag(False, "step the schedule every update, not every epoch")
    lr: float | None = _flag(None, "learning rate; overrides --lr-base", kind=float, within="[0, inf)")
    lr_base: float = _flag(0.1, "learning rate at --lr-base-size images, scaled to the global batch", within="[0, inf)")
    lr_base_size: int = _flag(256, "see --lr-base", within="[1, inf)")
    lr_base_scale: str = _flag("", "scaling of --lr-base; sqrt for Adam, linear else", choices=("", "linear", "sqrt"))
    epochs: int = _flag(300, "epochs to train", within="[1, inf)")
    warmup_lr: float = _flag(1e-5, "learning rate at the start of warm-up", within="[0, inf)")
    warmup_epochs: int = _flag(5, "epochs of warm-up", within="[0, inf)")
    warmup_prefix: bool = _flag(False, "warm-up comes before the schedule instead of replacing its start")
    min_lr: float = _flag(0.0, "lowest learning rate of a cyclic schedule", within="[0, inf)")
    cooldown_epochs: int = _flag(0, "epochs at --min-lr after the schedule", within="[0, inf)")
    decay_epochs: int = _flag(90, "epochs between decays of a step schedule", within="[1, inf)")
    decay_milestones: list[int] = _flag(
        [90, 180, 270], "epochs of the decays of multistep", kind=int, nargs="+", within="[0, inf)", ordered=True
    )
    decay_rate: float = _flag(0.1, "factor of a decay", within="(0, inf)")
    patience_epochs: int = _flag(10, "epochs without gain before plateau decays", within="[0, inf)")

    no_aug: bool = _flag(False, "train on evaluation crops", group="Augmentation and regularisation")
    scale: list[float] = _flag(
        [0.08, 1.0], "area of the random crop", kind=float, nargs=2, within="(0, 1]", ordered=True
    )
    ratio: list[float] = _flag(
        [3.0 / 4.0, 4.0 / 3.0], "aspect ratio of the random crop", kind=float, nargs=2, within="(0, inf)", ordered=True
    )
    hflip: float = _flag(0.5, "chance of a left-right flip", within="[0, 1]")
    vflip: float = _flag(0.0, "chance of an upside-down flip", within="[0, 1]")
    color_jitter: float = _flag(
        0.4, "strength of colour jitter; anything above 0 leaves the fast decoding path", within="[0, inf)"
    )
    aa: str | None = _flag(None, "AutoAugment policy, timm's, for example rand-m9-mstd0.5", at_build=True)
    train_interpolation: str = _flag("random", "resize of training crops", choices=("random", "bilinear", "bicubic"))
    reprob: float = _flag(0.0, "chance of random erasing", within="[0, 1]")
    remode: str = _flag("pixel", "fill of random erasing", choices=("const", "rand", "pixel"))
    recount: int = _flag(1, "areas erased", within="[1, inf)")
    mixup: float = _flag(0.0, "mixup alpha", within="[0, inf)")
    cutmix: float = _flag(0.0, "cutmix alpha", within="[0, inf)")
    cutmix_minmax: list[float] | None = _flag(
        None, "cutmix min and max ratio", kind=float, nargs="+", within="[0, 1]", counts=(2,), ordered=True
    )
    mixup_prob: float = _flag(1.0, "chance of mixup or cutmix in a batch", within="[0, 1]")
    mixup_switch_prob: float = _flag(0.5, "chance of cutmix where both are on", within="[0, 1]")
    mixup_mode: str = _flag("batch", "how pairs are mixed", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = _flag(0, "stop mixing after this epoch; 0 = never", within="[0, inf)")
    smoothing: float = _flag(0.1, "label smoothing", within="[0, 1)")
    bce_loss: bool = _flag(False, "binary cross-entropy")
    bce_target_thresh: float | None = _flag(
        None, "threshold of soft targets in --bce-loss", kind=float, within="[0, 1]"
    )
    drop: float = _flag(0.0, "dropout", within="[0, 1)")
    drop_path: float | None = _flag(None, "stochastic depth", kind=float, within="[0, 1)")

    sync_bn: bool = _flag(False, "BatchNorm statistics over all ranks", group="BatchNorm and weight averaging")
    dist_bn: str = _flag("reduce", "running statistics after an epoch", choices=("reduce", "broadcast", ""))
    model_ema: bool = _flag(False, "keep a moving average of the weights, and evaluate it")
    model_ema_decay: float = _flag(0.9998, "decay of the average", within="[0, 1]")
    model_ema_warmup: bool = _flag(False, "raise the decay over the first steps")

    seed: int = _flag(42, "seed", group="Run", within="[0, 4294967295]")
    log_interval: int = _flag(50, "steps between log lines and scalars", within="[1, inf)")
    report_to: list[str] = _flag(
        ["tensorboard"],
        "where scalars go, one or several",
        kind=str,
        nargs="+",
        choices=("tensorboard", "wandb", "trackio", "none"),
    )
    val_interval: int = _flag(1, "epochs between evaluations", within="[1, inf)")
    checkpoint_hist: int = _flag(10, "checkpoints kept beside the best", within="[0, inf)")
    checkpoint_interval: int = _flag(
        0, "steps between checkpoints within an epoch; 0 = at its end only", within="[0, inf)"
    )
    workers: int = _flag(4, "data workers per rank", short="-j", within="[0, 1024]")
    pin_mem: bool = _flag(False, "pin host memory for faster copies to the GPU")
    output: str = _flag("runs", "folder of run folders")
    experiment: str = _flag("", "name of the run folder; <time>-<model>-<opt> by default")
    eval_metric: str = _flag("top1", "metric of the best checkpoint", choices=("top1", "top5", "loss"))
    resume: str = _flag("", "'auto' (newest checkpoint of the run folder) or a checkpoint folder")
    max_bad_images: float = _flag(
        1e-4, "share of unreadable images above which a run stops (ten are always let by)", within="[0, 1]"
    )
    dist_timeout: int = _flag(1800, "seconds before a rank that waits for a lost one gives up", within="[1, inf)")
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.experiment:
            check_name(self.experiment, "--experiment")
        for item in flags():
            value = getattr(self, item.name)
            if value is not None:
                _check_value(item, value)
        refuse(
            {
                f"--prune-begin {self.prune_begin} and --prune-end {self.prune_end} are fractions of all steps; use "
                "0 <= begin < end <= 1": not 0 <= self.prune_begin < self.prune_end <= 1,
                f"--amp-dtype {self.amp_dtype} does nothing without --amp; add --amp or drop it": (
                    self.amp_dtype and not self.amp
                ),
                f"--amp {self.amp} and --amp-dtype {self.amp_dtype} disagree; keep one of them": (
                    self.amp_dtype and self.mixed_precision != _PRECISIONS[self.amp_dtype]
                ),
                "--sched plateau looks at each epoch's metric; drop --sched-on-updates": (
                    self.sched == "plateau" and self.sched_on_updates
                ),
                f"--prune-end {self.prune_end} with --amp fp16: steps that the gradient scaler skips put the last mask "
                "update behind the end; use --prune-end 0.9 or less, or --amp bf16": (
                    self.mixed_precision == "fp16" and self.sparsity and self.prune_end > 0.9
                ),
                "--report-to none goes with no other; leave one of them out": (
                    "none" in self.report_to and len(self.report_to) > 1
                ),
                "-b and --global-batch-size both set the batch; keep one of them": (
                    self.global_batch_size is not None and "batch_size" in self.given
                ),
            }
        )

    @property
    def mixed_precision(self) -> str:
        """Accelerate's word for the precision: no, fp16 or bf16."""
        if not self.amp:
            return "no"
        return _PRECISIONS[(self.amp_dtype or "float16") if self.amp == "default" else self.amp]

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is on, so that targets are soft."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    def to_dict(self) -> dict[str, Any]:
        """All settings, for args.yaml; reading it back with -c repeats the run."""
        return {item.name: getattr(self, item.name) for item in flags()}


def flags() -> list[dataclasses.Field[Any]]:
    """The fields that are flags."""
    return [item for item in fields(Config) if item.name != "given"]


def flag_name(item: dataclasses.Field[Any]) -> str:
    """--weight-decay for the field weight_decay."""
    return "--" + item.name.replace("_", "-")


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LARGEST_INT = 2**31 - 1  # what torch, timm and timers take as a number of things


def _check_value(item: dataclasses.Field[Any], value: Any) -> None:
    """Raise ValueError unless a flag's value, from wherever, is one of those that the flag declares."""
    meta, flag = item.metadata, flag_name(item)
    choices, many = meta.get("choices"), isinstance(value, (list, tuple))
    known = ", ".join(choice for choice in choices or () if choice not in ("", "default"))
    refuse(
        {
            f"{flag} {one!r} is not known; choose one of {known}": choices and one not in choices
            for one in (value if many else [value])
        }
    )
    if isinstance(value, str) and not meta.get("at_build") and _UNPRINTABLE.search(value):
        raise ValueError(f"{flag} {value!r} has a character that cannot be printed; use plain text on one line")
    if isinstance(value, dict):
        refuse(
            {
                f"{flag} {key!r} is no argument's name; give key=value": not (
                    isinstance(key, str) and key.isidentifier()
                )
                for key in value
            }
        )
    shown = f"{flag} {' '.join(map(str, value)) if many else value}"
    counts = (meta["nargs"],) if many and isinstance(meta["nargs"], int) else meta.get("counts")
    if many and counts and len(value) not in counts:
        raise ValueError(f"{shown} must be {' or '.join(map(str, counts))} values")
    if "within" in meta and value != "auto":
        for number in value if many else [value]:
            _check_number(shown, number, meta["within"])
    if meta.get("ordered") and sorted(value) != list(value):
        raise ValueError(f"{shown} must be in ascending order")


def _check_number(shown: str, number: float, interval: str) -> None:
    """Raise ValueError unless a number lies in an interval such as [0, 1); NaN lies in none."""
    low, high = map(float, interval[1:-1].split(", "))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        least = f"at least {low:g}" if interval[0] == "[" else f"above {low:g}"
        raise ValueError(f"{shown} must be {f'{least} and finite' if high == float('inf') else f'in {interval}'}")
    if isinstance(number, int) and high == float("inf") and number > _LARGEST_INT:
        raise ValueError(f"{shown} must be at most {_LARGEST_INT}")
