"""The model of a run folder, built anew for inference, and images to try it on."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from toolkit.builder.data import create_loaders, input_settings, open_data, to_inputs
from toolkit.builder.model import create_model
from toolkit.builder.smaller import cut_as_saved
from toolkit.cli import parse
from toolkit.config import Config
from toolkit.data.remote import is_remote
from toolkit.dist import World
from toolkit.engine.checkpoint import best_checkpoint, complete_checkpoints, load_checkpoint, newest_checkpoint
from toolkit.files import read_json
from toolkit.shrink import Layers, refuse_shrunk


def run_weights(run: Path, which: str = "last", ema: bool | None = None) -> tuple[Path, dict[str, Tensor], bool]:
    """(checkpoint, weights by name, whether they are the average) of a run folder or one of its checkpoints.

    `which` is last or best; `ema` None takes the average where there is one. Raises ValueError where there is none.
    """
    refuse_shrunk(run, "a run")
    source = _checkpoint_of(run, which)
    state = load_checkpoint(source)
    if ema and state["ema"] is None:
        raise ValueError(f"{run} kept no average of its weights; leave out --model-ema")
    average = state["ema"] is not None and ema is not False
    return source, {key: value.contiguous() for key, value in state["ema" if average else "model"].items()}, average


def _checkpoint_of(run: Path, which: str) -> Path:
    if (run / "COMPLETE").is_file():
        return run
    folder = run / "checkpoints"
    found = best_checkpoint(folder) if which == "best" else newest_checkpoint(folder)
    if found is None:
        names = ", ".join(path.name for path in complete_checkpoints(folder)) or "none"
        raise ValueError(f"{run} has no {which} checkpoint (complete ones: {names}); give a run folder")
    return found


def run_model(checkpoint: Path, weights: dict[str, Tensor]) -> tuple[nn.Module, Config, Layers]:
    """The model of a checkpoint of a run with these weights, in eval mode on CPU in float32, and the run's settings.

    Third, what is left of the layers of timm's model, where the run has gone on with a smaller one (--prune-shrink).

    Raises ValueError where the checkpoint does not lie in its run's folder; prints one line and exits for settings that
    this version does not know.
    """
    run = checkpoint.parents[1]
    if not (run / "args.yaml").is_file():
        raise ValueError(f"{run} has no args.yaml, which says what the model is; give a run folder as train.py left it")
    settings = parse(["-c", str(run / "args.yaml")], prog="launch.export")
    config = dataclasses.replace(settings, pretrained=False, initial_checkpoint="", workers=0, model_dtype=None)
    # The number of classes is what the weights say it is: the data may be elsewhere.
    facts = read_json(run / "metrics.json") if (run / "metrics.json").is_file() else {}
    num_classes = int(facts.get("num_classes") or 0) or open_data(config).num_classes
    model = create_model(config, num_classes)
    smaller = cut_as_saved(model, checkpoint)
    model.load_state_dict(weights)
    return model.eval(), config, {} if smaller is None else smaller.layers


def evaluation_batches(config: Config, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(normalised images, labels) of the run's whole evaluation split, batch by batch.

    Raises OSError or ValueError where its data is not on this machine, or is not as it was.
    """
    if is_remote(config.data_dir):
        raise FileNotFoundError(f"{config.data_dir} is not on this machine")
    inputs = input_settings(config, model)
    _, loader = create_loaders(config, open_data(config), inputs, World())
    normalise = to_inputs(inputs, model, channels_last=False)
    for batch in loader:
        images, labels = normalise(batch)
        real = batch.weights > 0  # a short batch is filled up
        yield images[real], labels[real]


def some_images(config: Config, model: nn.Module, count: int) -> tuple[Tensor, str]:
    """At most `count` normalised images of the run's evaluation split, or random ones, and which these are in words."""
    size = input_settings(config, model)["input_size"]
    try:
        taken, batches = 0, []
        for images, _ in evaluation_batches(config, model):
            batches.append(images[: count - taken])
            taken += len(batches[-1])
            if taken == count:
                break
        return torch.cat(batches), f"{taken} images of {config.data_dir}, split {config.val_split}"
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        images = torch.randn(32, *size, generator=torch.Generator().manual_seed(0))
        return images, f"32 random images, for the run's data is not at hand ({reason})"


def flops(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Floating-point operations of one image (2 a multiplication and addition), by torch's counter."""
    tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(model, tensors, (torch.empty(1, *input_size, device="meta"),))
    return counter.get_total_flops()


def num_weights(model: nn.Module) -> int:
    """All parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def difference(wanted: Tensor, got: Tensor) -> float:
    """Largest difference of two outputs, as a part of the largest output where that is above 1."""
    return float((wanted - got).abs().max() / wanted.abs().max().clamp(min=1.0))
