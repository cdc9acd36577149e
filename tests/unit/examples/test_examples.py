"""Every file of examples/ is run; each must end with exactly the zeros that it asks for."""

import argparse
import importlib.util
import math
import shlex
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ParseKwargs
from torch import nn

FOLDER = Path(__file__).parents[3] / "examples"
ALONE = ["plain_loop", "finetune_pruned"]
RANKS = ["accelerate_ddp", "fully_shard"]
NOT_INSTALLED = "not installed; requirements-dev.txt has it"


@pytest.fixture(autouse=True)
def _one_thread():
    """Small operations gain nothing from two, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prunable_weights(name, **options):
    model = timm.create_model(name, num_classes=10, **options)
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


RESNET = prunable_weights("test_resnet")


def test_every_example_is_here():
    modules = {path.stem for path in FOLDER.glob("*.py")}
    assert modules == {*ALONE, *RANKS, "huggingface_trainer", "lightning_module", "deepspeed_zero"}
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} - {f"{m}.py" for m in modules} == {
        "timm_train.sh"
    }


def test_plain_loop():
    assert load("plain_loop").main() == (math.floor(0.7 * RESNET), RESNET)


def test_fine_tuning_keeps_each_zero():
    example = load("finetune_pruned")
    zeros, weights = example.main()
    assert weights == RESNET
    assert zeros == pytest.approx(0.7 * weights, abs=20)  # each layer's share was rounded
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with torch.no_grad():
        model[1].weight[:, ::4] = 0
    example.finetune(model, sparsity=0.1)
    kept = torch.ones(3072, dtype=torch.bool)
    kept[::4] = False
    assert torch.equal((model[1].weight != 0).all(0), kept)


def test_huggingface_trainer():
    pytest.importorskip("transformers", reason=f"transformers is {NOT_INSTALLED}")
    weights = 2 * (32 * 96 + 32 * 32 + 2 * 32 * 128)  # the Conv1D of two layers: no embedding, no tied head
    assert load("huggingface_trainer").main() == (math.floor(0.7 * weights), weights)


def test_lightning_module():
    pytest.importorskip("lightning", reason=f"lightning is {NOT_INSTALLED}")
    assert load("lightning_module").main() == (math.floor(0.7 * RESNET), RESNET)


def test_timms_command_line():
    """timm's package has no train.py, so its flags are read as it reads them and go the way it sends them."""
    text = (FOLDER / "timm_train.sh").read_text()
    steps = {"${BEGIN_STEP:-500}": "2", "${END_STEP:-6000}": "6", "${FREQUENCY:-50}": "2"}
    for long, short in steps.items():
        assert long in text
        text = text.replace(long, short)
    flags = shlex.split(text[text.index("--device-modules", text.index("exec python")) :].replace("\\\n", " "))
    parser = argparse.ArgumentParser()
    parser.add_argument("--device-modules", nargs="+")
    parser.add_argument("--opt")
    parser.add_argument("--weight-decay", type=float)
    parser.add_argument("--opt-kwargs", nargs="*", action=ParseKwargs)
    options = parser.parse_args(flags)
    for module in options.device_modules:
        importlib.import_module(module)
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = create_optimizer_v2(
        model, options.opt, lr=1e-3, weight_decay=options.weight_decay, **options.opt_kwargs
    )
    for _ in range(8):
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.pruning.sparsity() == (math.floor(0.7 * RESNET), RESNET)
