"""The model and its loss."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm, set_fast_norm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.func import functional_call

from toolkit.builder.data import input_settings
from toolkit.builder.optimizer import layer_scales
from toolkit.builder.recompute import checkpoint_activations
from toolkit.builder.weights import load_initial_weights
from toolkit.config import Config
from toolkit.dist import World
from toolkit.errors import blaming, refuse
from toolkit.flag import flag_name

# A flag of timm's train.py -> the argument of its models that it sets.
_ARGUMENTS = {"drop_path": "drop_path_rate", "drop_block": "drop_block_rate", "gp": "global_pool"}


def amp_dtype(config: Config) -> torch.dtype | None:
    """The dtype of forward passes under mixed precision, None without it."""
    return {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]


def model_arguments(config: Config) -> dict[str, Any]:
    """What timm is to make the model with, beside its name and classes, where that is not the model's own default."""
    given = {argument: getattr(config, name) for name, argument in _ARGUMENTS.items()}
    given["in_chans"] = None if config.channels == 3 else config.channels  # not every model takes it
    return {key: value for key, value in given.items() if value is not None} | config.model_kwargs


def create_model(config: Config, num_classes: int) -> nn.Module:
    """timm's model for the data set's classes, its input size as flagged."""
    if not timm.is_model(config.model.partition(".")[0]):
        near = difflib.get_close_matches(config.model, timm.list_models(), n=3)
        raise ValueError(f"--model {config.model} is not a timm model; did you mean {', '.join(near) or 'resnet50'}?")
    num_classes, start = config.num_classes or num_classes, config.initial_checkpoint
    half = config.model_dtype == "bfloat16"
    refuse(
        {
            "--model-dtype bfloat16 and --amp: as in timm, all is computed in bfloat16 anyway; leave one out": (
                half and config.amp
            ),
            "--model-dtype bfloat16 and --model-ema: an average in bfloat16 stands still, for its steps are below half "
            "an ulp; leave one out": half and config.model_ema,
            f"--initial-checkpoint {start} does not exist; check the path": start and not Path(start).exists(),
            f"{config.data_dir} does not say how many classes it has; add --num-classes": num_classes < 1,
        }
    )
    options = {"drop_rate": config.drop, **model_arguments(config)}
    more = " ".join(f"{key}={value}" for key, value in config.model_kwargs.items())
    asked = f"--model {config.model}{' --pretrained' * config.pretrained}{more and f' --model-kwargs {more}'}"
    flagged = [name for name in _ARGUMENTS if getattr(config, name) is not None]
    asked += "".join(f" {flag_name(name)} {getattr(config, name)}" for name in flagged)
    remedy = "see --model-kwargs" if more else "see timm.list_pretrained()" if config.pretrained else ""
    set_fast_norm(config.fast_norm)  # norms look it up when they are made
    with blaming(asked, remedy):
        model = timm.create_model(config.model, pretrained=config.pretrained, num_classes=num_classes, **options)
        refuse(
            {
                f"that is no classifier of {num_classes} classes": getattr(model, "num_classes", None) != num_classes,
                f"images are read with {config.channels} channels": (
                    options.get("in_chans", config.channels) != config.channels
                ),
            }
        )
    if config.sides is not None and hasattr(model, "set_input_size") and "img_size" not in config.model_kwargs:
        size = f"--input-size {config.input_size}" if config.input_size else f"--img-size {config.img_size}"
        with blaming(f"{size} does not suit {config.model}"):
            # Vision transformers: the position embeddings follow.
            model.set_input_size(img_size=config.sides)  # type: ignore[operator]
    if config.model_kwargs or flagged:  # some values are first looked at in the forward pass
        with blaming(asked, remedy):
            _try_forward(model, input_settings(config, model)["input_size"], num_classes)
    if config.initial_checkpoint:  # after the input size, on which position embeddings depend
        load_initial_weights(model, config)
    _adjust(model, config)
    return model


def _adjust(model: nn.Module, config: Config) -> None:
    """What timm's train.py sets once a model is made: BatchNorm's numbers (here of any model), the classifier's start.

    Raises ValueError where there is nothing of the kind.
    """
    numbers = {"momentum": config.bn_momentum, "eps": config.bn_eps}
    wanted = {key: value for key, value in numbers.items() if value is not None}
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    heads = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    scale, bias = config.head_init_scale, config.head_init_bias
    refuse(
        {
            f"--bn-momentum and --bn-eps: {config.model} has no BatchNorm; leave them out": wanted and not norms,
            f"--head-init-scale and --head-init-bias: {config.model} has no single linear classifier; leave them out": (
                (scale is not None or bias is not None) and not hasattr(heads, "bias")
            ),
        }
    )
    for module in norms:
        vars(module).update(wanted)
    if scale is not None:
        for parameter in heads.parameters():  # type: ignore[union-attr]
            parameter.data.mul_(scale)
    if bias is not None:
        nn.init.constant_(heads.bias, bias)  # type: ignore[union-attr]
    layer_scales(config, model)  # which freezes what --layer-decay-no-opt-scale leaves out
    if config.model_dtype:
        model.to(getattr(torch, config.model_dtype))
        for module in norms:  # running averages in bfloat16 stand still within 4 % of their goal: a third of a point
            module.float()


def _try_forward(model: nn.Module, input_size: tuple[int, int, int], num_classes: int) -> None:
    """A forward pass of two images without values, which draws and changes nothing. Raises what the model does."""
    tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    scores = functional_call(model, tensors, (torch.empty(2, *input_size, device="meta"),))
    shape = tuple(getattr(scores, "shape", ()))
    refuse({f"it gives no score a class ({num_classes}) and image": shape != (2, num_classes)})


def place_model(model: nn.Module, config: Config, world: World) -> None:
    """Onto the device, in the memory layout asked for, with synchronised BatchNorm where asked for; in place."""
    if config.sync_bn and world.num_ranks > 1:
        convert_sync_batchnorm(model)  # timm's: torch's drops the activation of BatchNormAct2d
    if config.grad_checkpointing:  # on the modules that stay
        checkpoint_activations(model, config.model)
    model.to(world.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)


def compile_model(model: nn.Module, config: Config) -> nn.Module:
    """torch.compile around DDP, as timm does it, and around FSDP2; DeepSpeed's engine compiles the module within it."""
    if not config.torchcompile:
        return model
    known = torch.compiler.list_backends(exclude_tags=())
    if config.torchcompile not in known:
        raise ValueError(
            f"--torchcompile {config.torchcompile} is not a backend here; choose one of {', '.join(known)}"
        )
    backend, mode = config.torchcompile, config.torchcompile_mode
    if hasattr(model, "is_compiled"):
        model.compile(backend=backend, compile_kwargs={"mode": mode})
        return model
    return torch.compile(model, backend=backend, mode=mode)  # type: ignore[return-value]


def train_loss(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """timm's choice of loss."""
    if config.bce_loss:
        smoothing = 0.0 if config.mixes else config.smoothing
        return BinaryCrossEntropy(
            smoothing=smoothing,
            target_threshold=config.bce_target_thresh,
            sum_classes=config.bce_sum,
            pos_weight=config.bce_pos_weight,
        )
    if config.mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()
