"""--auto-batch-size: the largest batch that is predicted to fit, confirmed by a real step where there is a GPU."""

import dataclasses

import torch
from torch import nn

from toolkit.builder.model import model_options
from toolkit.config import Config
from toolkit.log import get_logger
from toolkit.memory.predict import Prediction, Question, parse_bytes

__all__ = ["confirm_batch_size", "predict_peaks", "with_automatic_batch_size"]

_AMP = {None: None, "float16": "fp16", "bfloat16": "bf16", "fp16": "fp16", "bf16": "bf16", "no": None}


def with_automatic_batch_size(config: Config, num_classes: int, num_samples: int, num_ranks: int) -> Config:
    """`config` with the batch size that --auto-batch-size asks for, or as it is without that flag."""
    if not config.auto_batch_size:
        return config
    if config.global_batch_size is not None:
        raise ValueError("--auto-batch-size and --global-batch-size both set the batch; leave one out")
    limit_bytes = parse_bytes(config.auto_batch_size)
    prediction = Prediction(_question(config, num_classes, num_ranks), lambda text: None)
    most = num_samples // (num_ranks * config.grad_accum_steps)
    found = min(prediction.largest_batch(limit_bytes), most)
    if config.mixes:
        found -= found % 2  # mixup and CutMix pair images
    if found < 1:
        raise ValueError(
            f"--auto-batch-size {config.auto_batch_size}: one image needs {prediction.needed_bytes(1) / 2**20:,.0f} "
            "MiB; use --amp, --grad-checkpointing or a smaller model"
        )
    get_logger().info(
        "--auto-batch-size %s: %d images per rank, predicted to need %.0f MiB%s",
        config.auto_batch_size,
        found,
        prediction.needed_bytes(found) / 2**20,
        " (all the data there is)" if found == most else "",
    )
    return dataclasses.replace(config, batch_size=found, auto_batch_size="")


def _question(config: Config, num_classes: int, num_ranks: int) -> Question:
    return Question(
        model=config.model,
        opt=config.opt,
        pruning=config.pruning,
        score=config.prune_score,
        sparsity=config.sparsity or 0.0,
        amp=_AMP[config.mixed_precision],
        img_size=config.img_size,
        num_classes=num_classes,
        model_options=model_options(config),
        ranks=num_ranks,
        ema=config.model_ema,
        grad_checkpointing=config.grad_checkpointing,
        channels_last=config.channels_last,
        fused_backward=config.fused_backward,
    )


def predict_peaks(config: Config, batch_size: int, num_classes: int, num_ranks: int) -> dict[str, dict[str, int]]:
    """Ledger at the peak of a step, dense and at final sparsity; empty, and logged, where it cannot be predicted."""
    try:
        # Making a model draws its initial weights; a run's generator must not move for a report.
        with torch.random.fork_rng(devices=[]):
            prediction = Prediction(_question(config, num_classes, num_ranks), lambda text: None)
        final = config.sparsity if prediction.method != "none" else None
        return {"dense": prediction.ledger(batch_size, None), "final": prediction.ledger(batch_size, final)}
    except (ValueError, RuntimeError, TypeError) as error:
        get_logger().warning("the step's memory is not predicted: %s", str(error).splitlines()[0] or repr(error))
        return {}


def confirm_batch_size(model: nn.Module, config: Config, size: tuple[int, ...], device: torch.device) -> None:
    """Forward and backward once at the batch size, on a GPU; leaves weights, buffers and generators as they were."""
    if device.type != "cuda":
        return
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    amp = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(_AMP[config.mixed_precision] or "")
    try:
        with torch.random.fork_rng([device]), torch.autocast("cuda", dtype=amp, enabled=amp is not None):
            model.train()(torch.zeros(config.batch_size, *size, device=device)).float().sum().backward()
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"a step with the predicted {config.batch_size} images per rank does not fit this GPU "
            f"({str(error).splitlines()[0]}); give --auto-batch-size less"
        ) from None
    finally:
        model.zero_grad(set_to_none=True)
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        torch.cuda.empty_cache()
