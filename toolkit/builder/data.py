"""Transforms, loaders, and what happens to a batch on the device."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from toolkit.config import Config
from toolkit.data.decode import EvalTransform, TrainTransform, Transform, timm_transform
from toolkit.data.index import ShardIndex, load_split
from toolkit.data.info import MAX_CLASSES, read_info
from toolkit.data.loader import Batch, EvalLoader, TrainLoader
from toolkit.data.remote import fetch_info, is_remote, remote_folder
from toolkit.data.shard_cache import ShardCache, load_remote_split
from toolkit.dist import World
from toolkit.errors import blaming

_REMOTE_WINDOW = 16  # shards; a window and the next should fit the cache, and a batch mixes 16 × 1,250 images
_LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue by ITU-R BT.601, as PIL's mode L

Augment = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Any]]


def input_settings(config: Config, model: nn.Module) -> dict[str, Any]:
    """Input size, mean, std, interpolation and crop of the model, by timm, with the flags on top."""
    flags = ("img_size", "input_size", "in_chans", "crop_pct", "mean", "std", "interpolation")
    given = {key: getattr(config, key) for key in flags}
    found = resolve_data_config({key: value for key, value in given.items() if value}, model=model)
    found["input_size"] = (config.channels, *found["input_size"][1:])  # timm leaves the model's own where it has one
    for key in ("mean", "std"):
        if len(found[key]) != config.channels:  # of the colours a model is for
            found[key] = (sum(found[key]) / len(found[key]),) * config.channels
    return found


@dataclass(frozen=True)
class DataSet:
    """What --data-dir holds: `_info.json`, and index and (behind a URL) cache of the training and evaluation split."""

    info: dict[str, Any]
    train: ShardIndex
    evaluation: ShardIndex
    train_cache: ShardCache | None = None
    evaluation_cache: ShardCache | None = None

    @property
    def num_classes(self) -> int:
        """Classes by `_info.json`, or as many as the labels need; ValueError where these need more than is taken."""
        highest = max(int(index.label.max(initial=-1)) for index in (self.train, self.evaluation))
        if highest >= MAX_CLASSES:
            raise ValueError(f"label {highest} is beyond the {MAX_CLASSES:,} classes that are taken; check the shards")
        return int(self.info.get("num_classes", highest + 1))


def open_data(config: Config) -> DataSet:
    """Find the two splits in a folder or behind a URL. Raises ValueError for what is missing, short or damaged."""
    names = (config.train_split, config.val_split)
    if not is_remote(config.data_dir):
        info = read_info(config.data_dir)
        train, evaluation = (load_split(Path(config.data_dir), name, config.max_bad_images) for name in names)
        return DataSet(info, train, evaluation)
    folder = Path(config.shard_cache) if config.shard_cache else remote_folder(config.data_dir)
    info, limit_bytes = fetch_info(config.data_dir, folder), int(config.shard_cache_gib * 2**30)
    (train, train_cache), (evaluation, evaluation_cache) = (
        load_remote_split(config.data_dir, info, name, folder, limit_bytes, config.max_bad_images) for name in names
    )
    return DataSet(info, train, evaluation, train_cache, evaluation_cache)


def batch_size_per_rank(config: Config, num_ranks: int) -> int:
    """Images per rank and micro-batch. Raises ValueError where --global-batch-size does not divide evenly."""
    wanted = config.global_batch_size
    if wanted is None:
        return config.batch_size
    share = num_ranks * config.grad_accum_steps
    if wanted < 1 or wanted % share:
        below, above = wanted // share * share, (wanted // share + 1) * share
        near = f"{below} or {above}" if below > 0 else str(above)
        raise ValueError(
            f"{num_ranks} ranks × accumulation {config.grad_accum_steps} do not divide --global-batch-size {wanted}; "
            f"use {near}"
        )
    return wanted // share


def create_loaders(
    config: Config, data: DataSet, inputs: dict[str, Any], world: World
) -> tuple[TrainLoader, EvalLoader]:
    """This rank's loaders of the two splits."""
    batch_size = batch_size_per_rank(config, world.num_ranks)
    height, width = inputs["input_size"][-2:]
    options: dict[str, Any] = {
        "rank": world.rank,
        "num_ranks": world.num_ranks,
        "workers": config.workers,
        "pin_memory": config.pin_mem and world.device.type == "cuda",
    }
    if config.mixes and batch_size % 2:
        raise ValueError(f"mixup and CutMix pair the images of a batch: {batch_size} per rank is odd; use an even -b")
    num_classes = config.num_classes or data.num_classes
    for split, index in ((config.train_split, data.train), (config.val_split, data.evaluation)):
        if int(index.label.max(initial=0)) >= num_classes:
            raise ValueError(
                f"split {split} has label {index.label.max()}, the model {num_classes} classes; check --num-classes"
            )
    train_loader = TrainLoader(
        data.train,
        train_transform(config, inputs),
        (height, width),
        seed=config.seed,
        batch_size=batch_size,
        accumulation=config.grad_accum_steps,
        repeats=max(config.aug_repeats, 1),
        window=shuffle_window(config),
        cache=data.train_cache,
        **options,
    )
    eval_loader = EvalLoader(
        data.evaluation,
        eval_transform(inputs),
        (height, width),
        batch_size=config.validation_batch_size or batch_size,
        cache=data.evaluation_cache,
        **options,
    )
    return train_loader, eval_loader


def shuffle_window(config: Config) -> int | None:
    """Shards whose samples are shuffled together; None is all of them."""
    if config.shuffle_window is None and is_remote(config.data_dir):
        return _REMOTE_WINDOW
    return config.shuffle_window or None


def train_transform(config: Config, inputs: dict[str, Any]) -> Transform:
    """The fast path where resize, crop and flip are all that is asked for, timm's transforms otherwise."""
    if config.no_aug:
        return eval_transform(inputs)
    height, width = inputs["input_size"][-2:]
    scale, ratio = (config.scale[0], config.scale[1]), (config.ratio[0], config.ratio[1])
    chances = {name: getattr(config, name) for name in ("color_jitter_prob", "grayscale_prob", "gaussian_blur_prob")}
    chances = {name: chance for name, chance in chances.items() if chance is not None}
    plain = config.train_crop_mode in (None, "rrc") and not any(chances.values())
    if not config.aa and not config.color_jitter and plain:
        return TrainTransform((height, width), scale, ratio, config.hflip, config.vflip, config.train_interpolation)
    asked = f"--aa {config.aa}" if config.aa else f"--color-jitter {config.color_jitter}"
    with blaming(asked, "see timm's create_transform"):
        transform = create_transform(
            (height, width),
            is_training=True,
            use_prefetcher=True,
            scale=scale,
            ratio=ratio,
            hflip=config.hflip,
            vflip=config.vflip,
            train_crop_mode=config.train_crop_mode,
            color_jitter=config.color_jitter,
            **chances,
            auto_augment=config.aa,
            interpolation=config.train_interpolation,
            mean=tuple(inputs["mean"]) * (3 // len(inputs["mean"])),  # it fills images still in colour
            std=tuple(inputs["std"]) * (3 // len(inputs["std"])),
        )
    return partial(timm_transform, transform)


def eval_transform(inputs: dict[str, Any]) -> Transform:
    """timm's evaluation transform, by the fast path for a plain square centre crop."""
    height, width = inputs["input_size"][-2:]
    plain = inputs["crop_mode"] == "center" and height == width
    if plain and inputs["interpolation"] in ("bilinear", "bicubic"):
        return EvalTransform((height, width), inputs["crop_pct"], inputs["interpolation"])
    options = {key: inputs[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
    return partial(timm_transform, create_transform((height, width), is_training=False, use_prefetcher=True, **options))


def example_input(config: Config, model: nn.Module) -> Tensor:
    """An image for a forward pass, of the model's dtype and on its device; its values are left open."""
    weight = next(model.parameters())
    return weight.new_empty(1, *input_settings(config, model)["input_size"])


def to_inputs(
    inputs: dict[str, Any], model: nn.Module, channels_last: bool
) -> Callable[[Batch], tuple[Tensor, Tensor]]:
    """Batch of uint8 -> (normalised images in the model's dtype, labels) on the model's device."""
    weight = next(model.parameters())
    device, dtype = weight.device, weight.dtype
    mean, std = (
        torch.tensor(inputs[key], device=device, dtype=dtype).mul(255).view(1, -1, 1, 1) for key in ("mean", "std")
    )
    luma = torch.tensor(_LUMA, device=device, dtype=dtype).view(1, 3, 1, 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def normalise(batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(device, non_blocking=True).contiguous(memory_format=layout)
        if mean.numel() == 1:
            images = (images * luma).sum(1, keepdim=True)
        # uint8 - mean is computed and stored in the mean's dtype: one pass less than converting first.
        return torch.sub(images, mean).div_(std), batch.labels.to(device, non_blocking=True)

    if device.type != "cuda":
        return normalise
    side = torch.cuda.Stream(device)

    def normalise_beside(batch: Batch) -> tuple[Tensor, Tensor]:
        """The copy and the normalisation run while the main stream is still at work on the step before."""
        with torch.cuda.stream(side):
            made = normalise(batch)
        main = torch.cuda.current_stream(device)
        main.wait_stream(side)
        for tensor in made:
            tensor.record_stream(main)
        return made

    return normalise_beside


def augment(config: Config, world: World, num_classes: int) -> Augment:
    """Mixup, CutMix and random erasing on a device batch, by timm; seeded from (seed, micro-batch number, rank)."""
    mix = (
        Mixup(
            config.mixup,
            config.cutmix,
            config.cutmix_minmax,
            config.mixup_prob,
            config.mixup_switch_prob,
            config.mixup_mode,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )
        if config.mixes
        else None
    )
    erase = (
        RandomErasing(config.reprob, mode=config.remode, max_count=config.recount, device=world.device)
        if config.reprob > 0
        else None
    )

    def change(images: Tensor, labels: Tensor, number: int, epoch: int) -> tuple[Tensor, Tensor]:
        if mix is None and erase is None:
            return images, labels
        seed = int(np.random.SeedSequence([config.seed, number, world.rank]).generate_state(1)[0])
        np.random.seed(seed)  # noqa: NPY002  timm's Mixup draws from it
        random.seed(seed)  # and its RandomErasing from this
        if erase is not None:
            images = erase(images)
        if mix is not None:
            mix.mixup_enabled = not config.mixup_off_epoch or epoch < config.mixup_off_epoch
            images, labels = mix(images, labels)
        return images, labels

    return change
