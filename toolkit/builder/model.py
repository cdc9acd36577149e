"""The model and its loss."""

import difflib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from toolkit.builder.recompute import checkpoint_activations
from toolkit.config import Config
from toolkit.dist import World
from toolkit.engine.checkpoint import load_checkpoint as read_checkpoint
from toolkit.engine.checkpoint import newest_checkpoint
from toolkit.log import get_logger


def amp_dtype(config: Config) -> torch.dtype | None:
    """The dtype of forward passes under mixed precision, None without it."""
    return {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]


def create_model(config: Config, num_classes: int) -> nn.Module:
    """timm's model for the data set's classes, its input size as flagged."""
    if not timm.is_model(config.model.partition(".")[0]):
        near = difflib.get_close_matches(config.model, timm.list_models(), n=3)
        raise ValueError(f"--model {config.model} is not a timm model; did you mean {', '.join(near) or 'resnet50'}?")
    if config.initial_checkpoint and not Path(config.initial_checkpoint).exists():
        raise ValueError(f"--initial-checkpoint {config.initial_checkpoint} does not exist; check the path")
    num_classes = config.num_classes or num_classes
    if num_classes < 1:
        raise ValueError(f"{config.data_dir} does not say how many classes it has; add --num-classes")
    options: dict[str, Any] = {"drop_rate": config.drop, **config.model_kwargs}
    if config.drop_path is not None:
        options["drop_path_rate"] = config.drop_path
    try:
        model = timm.create_model(config.model, pretrained=config.pretrained, num_classes=num_classes, **options)
    except TypeError as error:
        raise ValueError(
            f"--model {config.model} does not take one of its arguments ({error}); see --model-kwargs"
        ) from None
    if config.img_size is not None and hasattr(model, "set_input_size") and "img_size" not in config.model_kwargs:
        # Vision transformers: the position embeddings follow.
        model.set_input_size(img_size=config.img_size)  # type: ignore[operator]
    if config.initial_checkpoint:  # after the input size, on which position embeddings depend
        try:
            _load_weights(model, Path(config.initial_checkpoint))
        except (RuntimeError, KeyError, pickle.UnpicklingError) as error:  # the last: it holds code
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--initial-checkpoint {config.initial_checkpoint} does not fit {config.model}: {reason}"
            ) from None
    return model


def _load_weights(model: nn.Module, source: Path) -> None:
    """Weights of a run or checkpoint folder of ours (the average, where it has one), or of a file that timm reads.

    A classifier of another number of classes stays as it was made.
    """
    if source.is_dir():
        saved = read_checkpoint(newest_checkpoint(source / "checkpoints") or source)
        weights = saved["ema"] or saved["model"]
    else:
        weights = timm.models.load_state_dict(str(source), device="cpu", weights_only=True)
    own, head = model.state_dict(), _classifier_names(model)
    classifier = [key for key in weights if key in head and weights[key].shape != own[key].shape]
    if classifier:
        get_logger().info("%s: the classifier (%s) is of other classes and starts anew", source, ", ".join(classifier))
    kept = {key: value for key, value in weights.items() if key not in classifier}
    model.load_state_dict({**{key: own[key] for key in classifier}, **kept})


def _classifier_names(model: nn.Module) -> set[str]:
    get: Any = getattr(model, "get_classifier", None)
    head = get() if get is not None else None
    members = {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


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
    """torch.compile around DDP, as timm does it."""
    if not config.torchcompile:
        return model
    return torch.compile(model, backend=config.torchcompile)  # type: ignore[return-value]


def train_loss(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """timm's choice of loss."""
    if config.bce_loss:
        smoothing = 0.0 if config.mixes else config.smoothing
        return BinaryCrossEntropy(smoothing=smoothing, target_threshold=config.bce_target_thresh)
    if config.mixes:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.smoothing) if config.smoothing else nn.CrossEntropyLoss()
