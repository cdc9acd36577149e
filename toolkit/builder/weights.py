"""--initial-checkpoint, --kd-checkpoint: the weights that a model starts from, or a teacher has."""

import pickle
import sys
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import Tensor, nn

from toolkit.config import Config
from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint
from toolkit.errors import blaming, refuse
from toolkit.log import get_logger
from toolkit.shrink import refuse_shrunk

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_TORCH_SAVES = (b"PK", b"\x80")  # a zip file, or before torch 1.6 a pickle
_SHOWN_CHARACTERS = 160  # of each list of names


def load_initial_weights(model: nn.Module, config: Config) -> None:
    """Weights of a run or checkpoint folder of ours (the average, where it has one), or of a file that timm reads.

    A classifier of another number of classes stays as it was made; position embeddings of another input size are
    resized by timm. Raises ValueError for a file that holds no weights, or those of another model.
    """
    source = Path(config.initial_checkpoint)
    refuse_shrunk(source, "--initial-checkpoint")
    with blaming(f"--initial-checkpoint {source} does not fit {config.model}"):
        classifier = _load(model, _read(source))
    if classifier:
        get_logger().info("%s: the classifier (%s) is of other classes and starts anew", source, ", ".join(classifier))


def load_teacher(model: nn.Module, config: Config) -> None:
    """The weights of --kd-checkpoint, as `load_initial_weights`, but none may be missing. Raises ValueError."""
    source = Path(config.kd_checkpoint)
    refuse_shrunk(source, "--kd-checkpoint")
    with blaming(f"--kd-checkpoint {source} does not fit {config.kd_model_name}"):
        refuse({"it does not exist; check the path": not source.exists()})
        refuse({"its classifier is of other classes; train one on these": _load(model, _read(source))})


def _read(source: Path) -> dict[str, Tensor]:
    if source.is_dir():
        saved = load_checkpoint(newest_checkpoint(source / "checkpoints") or source)
        if saved.get("smaller") is not None:
            raise ValueError("it is of a run that has gone on with a smaller model (--prune-shrink); give a whole one")
        return saved["ema"] or saved["model"]
    _check_start(source)
    try:
        weights: dict[str, Any] = timm.models.load_state_dict(str(source), device="cpu", weights_only=True)
    except (SafetensorError, EOFError, IndexError, pickle.UnpicklingError) as error:
        raise ValueError(f"it is damaged or cut short ({error}); copy it again") from error
    except AttributeError as error:  # timm asks a list, or a number, for its items
        raise ValueError("it holds no dict of weights by name; save model.state_dict()") from error
    others = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if others or not weights:
        shown = ", ".join(map(str, others[:3])) or "nothing"
        raise ValueError(f"it holds other things than weights ({shown}); save model.state_dict()")
    return weights


def _check_start(file: Path) -> None:
    """Raise ValueError for what is no file of weights by its first bytes."""
    with open(file, "rb") as opened:
        start = opened.read(len(_LFS_POINTER))
    known = file.suffix == ".safetensors" or start.startswith(_TORCH_SAVES)
    refuse(
        {
            "it is empty; copy it again": not start,
            "it is Git LFS's pointer to the weights, not the weights; fetch them with git lfs pull": (
                start == _LFS_POINTER
            ),
            f"torch.save did not write it (it begins with {start[:8]!r}); use .pth or .safetensors": not known,
        }
    )


def _load(model: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Returns the names of the classifier's weights where they are of other classes, and left as they were."""
    own, head = model.state_dict(), _classifier_names(model)
    body = {key: weight.shape for key, weight in own.items() if key not in head}
    if body != {key: weight.shape for key, weight in weights.items() if key not in head}:
        # What timm does to weights it fetches: other names, position embeddings of another input size.
        adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        weights = adapt(weights, model) if adapt is not None else weights
    classifier = [key for key in weights if key in head and weights[key].shape != own[key].shape]
    try:
        model.load_state_dict({**weights, **{key: own[key] for key in classifier}})
    except RuntimeError as error:  # a title, then a line of missing names, one of unknown ones, one a wrong shape
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        shown = [line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]} …" for line in lines]
        raise ValueError(" ".join(shown)) from error
    return classifier


def _classifier_names(model: nn.Module) -> set[str]:
    """Names of the classifier's parameters; distilled models have two classifiers."""
    get: Any = getattr(model, "get_classifier", None)
    found = get() if get is not None else None
    heads = [head for head in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(head, nn.Module)]
    members = {id(parameter) for head in heads for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}
