"""--auto-batch-size: the largest batch that is predicted to fit, confirmed by a real step where there is a GPU."""

import dataclasses

import torch
from torch import nn

from toolkit.builder.data import DataSet
from toolkit.builder.model import amp_dtype
from toolkit.builder.predict import Prediction, parse_bytes
from toolkit.config import Config
from toolkit.log import get_logger


def with_automatic_batch_size(config: Config, data: DataSet, num_ranks: int) -> Config:
    """`config` with the batch size that --auto-batch-size asks for, or as it is without that flag."""
    if not config.auto_batch_size:
        return config
    if config.global_batch_size is not None:
        raise ValueError("--auto-batch-size and --global-batch-size both set the batch; leave one out")
    limit_bytes = parse_bytes(config.auto_batch_size)
    prediction = Prediction(config, data.num_classes, num_ranks)
    most = len(data.train) // (num_ranks * config.grad_accum_steps)
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
    return dataclasses.replace(config, batch_size=found)


def confirm_batch_size(model: nn.Module, config: Config, size: tuple[int, ...], device: torch.device) -> None:
    """Forward and backward once at the batch size found, on a GPU; leaves weights, buffers, generators as they were."""
    if not config.auto_batch_size or device.type != "cuda":
        return
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    amp = amp_dtype(config)
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
