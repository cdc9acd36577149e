"""--fused-backward changes what gradients take, and not one bit of the result."""

import json
from functools import partial

import pytest
import timm
import torch
from flags import train_flags
from ranks import reset_accelerate
from timm.optim import create_optimizer_v2
from torch import nn

import toolkit.optim  # noqa: F401
import train
from toolkit.engine.engines.fused import FusedBackward
from toolkit.memory.activations import track_step
from toolkit.memory.ledger import find_owners
from toolkit.memory.probe import StepProbe
from toolkit.optim.registry import specs
from toolkit.prune.groups import prunable_names

NAMES = [(spec.name, spec.method) for spec in specs()]
STEPS = 9


def build(name, method, **more):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).train()
    prunable = prunable_names(model)
    named = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if (n in prunable) is may], "prunable": may, "weight_decay": 0.1 * may}
        for may in (True, False)
    ]
    pruning = {} if method == "none" else {"sparsity": 0.7, "begin_step": 2, "end_step": 6, "frequency": 2}
    optimizer = create_optimizer_v2(groups, name, lr=3e-3, weight_decay=0.1, **pruning, **more)
    return model, optimizer


def loss_of(model, step):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(images), torch.tensor([1, 2, 3, 4]))


def run(name, method, fused, **more):
    model, optimizer = build(name, method, **more)
    fusing = FusedBackward(optimizer) if fused else None
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 / step
        optimizer.zero_grad()
        loss = loss_of(model, step)
        if fusing is None:
            loss.backward()
            optimizer.step()
        elif not fusing.backward(step, loss.backward):
            optimizer.step()
        else:
            assert all(parameter.grad is None for parameter in model.parameters())
    return model.state_dict(), optimizer.state_dict()


@pytest.mark.parametrize(
    ("name", "method", "more"),
    [(*row, {}) for row in NAMES]
    + [("adamwprune", "state", {"regrow": 0.2}), ("adamwprune", "state", {"state_dtype": "bfloat16"})]
    + [("adamwprune", "state", {"state_budget": "auto"})],
)
def test_equal_to_a_step_of_its_own(name, method, more):
    (weights, state), (fused_weights, fused_state) = run(name, method, False, **more), run(name, method, True, **more)
    assert all(torch.equal(value, fused_weights[key]) for key, value in weights.items())
    for index, values in state["state"].items():
        for key, value in values.items():
            assert torch.equal(value, fused_state["state"][index][key]), (index, key)
    assert str(state["param_groups"]) == str(fused_state["param_groups"])


def test_only_the_largest_gradients_live():
    model, optimizer = build("adamw", "none")
    fused = FusedBackward(optimizer)
    for step in (1, 2):
        probe = StepProbe(lambda: find_owners(model, optimizer.state))
        with probe:
            loss = loss_of(model, step)
            probe.forward_done()
            assert fused.backward(step, loss.backward, probe)
    every = sum(parameter.nbytes for parameter in model.parameters())
    assert probe.rows["gradients"] < 0.5 * every
    predicted = track_step(
        partial(timm.create_model, "test_resnet", num_classes=10), (3, 32, 32), 10, frees_gradients=True
    ).peak(4)
    assert probe.rows["gradients"] == predicted["gradients"]


def test_small_parameters_are_updated_together():
    """A call of the optimizer costs the host as much as a layer: one for each large tensor, one for each group."""
    model, optimizer = build("adamwprune", "none")
    fused, calls = FusedBackward(optimizer), []
    optimizer.register_step_pre_hook(lambda optimizer, *_: calls.append(len(optimizer.param_groups[0]["params"])))
    assert fused.backward(1, loss_of(model, 1).backward)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert sum(calls) == len(sizes)
    assert len(calls) == sum(size >= 4096 for size in sizes) + 2 < len(sizes) / 2


@pytest.fixture
def flags(few_digits, tmp_path):
    return train_flags(few_digits, tmp_path, "--epochs", "2")


def test_a_run(flags, tmp_path):
    more = ["--opt", "adamwprune", "--sparsity", "0.7", "--model-ema"]
    for name, flag in (("plain", []), ("fused", ["--fused-backward"])):
        assert train.main([*flags, *more, *flag, "--experiment", name]) == 0
        reset_accelerate()
    plain, fused = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("plain", "fused"))
    assert plain["eval_loss"] == fused["eval_loss"]
    assert plain["train_loss"] == fused["train_loss"]
    ledger = json.loads((tmp_path / "fused" / "memory.json").read_text())["ledger"]
    (row,) = [row for row in ledger["rows"] if row["name"] == "gradients"]
    assert row == {"name": "gradients", "measured_bytes": 0, "predicted_bytes": 0}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--grad-accum-steps", "2"], "gradients must outlive backward"),
        (["--clip-grad", "1"], "clipping needs all gradients"),
        (["--opt", "lamb"], "it may look at all gradients together"),
        (["--torchcompile", "eager"], "it was not tried"),
    ],
)
def test_refused_with_the_reason(flags, more, reason, capsys):
    assert train.main([*flags, *more, "--fused-backward"]) == 2
    said = capsys.readouterr().err
    assert reason in said
    assert "leave one of them out" in said
