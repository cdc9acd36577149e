"""Every optimizer of timm's factory through a checkpoint: saved and loaded by name, equal to not stopping."""

import warnings

import pytest
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

import toolkit.optim  # noqa: F401  registers ours
from toolkit.builder.optimizer import resolve_optimizer
from toolkit.cli import parse
from toolkit.dist import World
from toolkit.engine.checkpoint import load_checkpoint, save_checkpoint
from toolkit.engine.engines.ddp import Engine

REFUSED = {"adahessian": "second derivatives", **dict.fromkeys(("kron", "kronc", "kronw"), "compiles parts of itself")}
PACKAGES = {"bnb": "bitsandbytes", "fused": "apex"}  # names that begin so come with another package
PRUNED = {"sparsity": 0.5, "begin_step": 1, "end_step": 4, "frequency": 1}
NAMES = [name for name in list_optimizers() if name not in REFUSED]
LOOKAHEAD = ["lookahead_adamw", "lookahead_sgd", "lookahead_radam"]


def make(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    ours = name.endswith(("-state", "-magnitude", "-movement")) or name in ("adamwprune", "sgdprune")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = create_optimizer_v2(model, name, lr=1e-3, **(PRUNED if ours else {}))
    accelerator = Accelerator(cpu=True)
    return Engine(accelerator, model, model, optimizer, optimizer, World.detect(torch.device("cpu")))


def train(engine, first, last):
    for step in range(first, last):
        images = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        engine.zero_grad()
        engine.module(images).square().mean().backward()
        engine.inner_optimizer.step()


def through_a_checkpoint(engine, other, folder):
    """What a snapshot does with the optimizer and the model."""
    tensors, plain = {f"model.{name}": tensor for name, tensor in engine.weights()}, {}
    for name, key, value in engine.optimizer_states():
        if torch.is_tensor(value):
            tensors[f"optimizer.{key}.{name}"] = value
        else:
            plain.setdefault(name, {})[key] = value
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in engine.inner_optimizer.param_groups
    ]
    state = {"model": {}, "ema": None, "optimizer": {"state": plain, "param_groups": groups}}
    assert save_checkpoint(folder, state, 2, world=World(), history=1, tensors=tensors.items())
    saved = load_checkpoint(folder / "step-00000002")
    other.load_weights(saved["model"])
    other.load_optimizer_states(saved["optimizer"]["state"], saved["optimizer"]["param_groups"])


@pytest.mark.parametrize("name", [*NAMES, *LOOKAHEAD])
def test_resume_equals_not_stopping(name, tmp_path):
    for prefix, package in PACKAGES.items():
        if name.startswith(prefix):
            pytest.importorskip(package)
    straight, other = make(name), make(name)
    train(straight, 0, 2)
    through_a_checkpoint(straight, other, tmp_path)
    train(straight, 2, 9)
    train(other, 2, 9)
    for mine, wanted in zip(other.module.parameters(), straight.module.parameters(), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("name", REFUSED)
def test_those_that_cannot_train_here_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"--opt {name} cannot train here: it .*{REFUSED[name]}"):
        resolve_optimizer(parse(["--opt", name]))
