"""Every byte has an owner, for every optimizer × pruning: the ledger of a step's peak against two other counts.

The probe names what it sees; the prediction is made beforehand from fake tensors and arithmetic; torch's MemTracker
counts all that is alive in a step of its own and knows nothing of rows.
"""

import functools

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

import toolkit.optim  # noqa: F401
from toolkit.builder.predict import Prediction
from toolkit.config import Config
from toolkit.memory.ledger import count_bytes, find_owners, optimizer_bytes
from toolkit.memory.probe import StepProbe
from toolkit.optim.registry import specs
from toolkit.prune.groups import prunable_names

NAMES = [
    (spec.name, spec.method, score)
    for spec in specs()
    for score in ([None, "displacement"] if spec.method == "movement" else [None])
]
BATCH, SIZE, BEGIN, END = 6, 64, 4, 7


def test_the_table_is_whole():
    assert len({name for name, _, _ in NAMES}) == 6 + 6 + 6 + 6  # bases, state, magnitude, movement
    assert {name.partition("-")[0] for name, method, _ in NAMES if method == "movement"} == {
        "sgd",
        "momentum",
        "adam",
        "adamw",
        "adamwadv",
        "adamwspam",
    }


def groups(model):
    prunable = prunable_names(model)
    named = list(model.named_parameters())
    return [{"params": [p for n, p in named if (n in prunable) is may], "prunable": may} for may in (True, False)]


def step(model, optimizer, number, probe=None):
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    loss = nn.functional.cross_entropy(model(images), labels)
    beside = [loss.detach().clone(), torch.zeros(2)]  # as in a run: the loss summed up, and two flags
    if probe is not None:
        probe.name("input", images, labels)
        probe.forward_done()
    divided = loss / 1
    divided.backward()
    del loss, divided, beside
    if probe is not None:
        probe.backward_done()
    optimizer.step()


@functools.cache
def tracked():
    """Forward and backward do not depend on the optimizer: tracked once."""
    return Prediction(Config(model="test_resnet", opt="adamw", img_size=SIZE, num_classes=10)).step


def predict(name, method, score, sparsity, monkeypatch):
    step_memory = tracked()
    monkeypatch.setattr("toolkit.builder.predict.track_step", lambda *_, **__: step_memory)
    final = None if method == "none" else 0.7
    asked = {"model": "test_resnet", "img_size": SIZE, "num_classes": 10, "state_dtype": "float32"}
    return Prediction(Config(opt=name, prune_score=score, sparsity=final, **asked)).ledger(BATCH, sparsity)


@pytest.mark.parametrize(("name", "method", "score"), NAMES)
def test_the_peak_to_the_byte(name, method, score, monkeypatch):
    expected = {"dense": predict(name, method, score, None, monkeypatch)}
    if method != "none":
        expected["final"] = predict(name, method, score, 0.7, monkeypatch)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).train()
    pruning = {} if method == "none" else {"sparsity": 0.7, "begin_step": BEGIN, "end_step": END, "frequency": 1}
    if score:
        pruning["score"] = score
    optimizer = create_optimizer_v2(groups(model), name, lr=1e-3, weight_decay=1e-2, **pruning)
    found, counted = {}, {}
    for number in range(1, END + 5):
        if number in (3, END + 3):
            phase = "dense" if number == 3 else "final"
            probe = StepProbe(lambda: find_owners(model, optimizer.state))
            with probe:
                step(model, optimizer, number, probe)
            found[phase] = probe.rows
            assert probe.part in ("forward", "backward", "update")
        elif number in (4, END + 4):
            optimizer.zero_grad()
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                step(model, optimizer, number)
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]  # shapes without bytes are on "meta"
            counted["dense" if number == 4 else "final"] = peak["Total"]
        else:
            step(model, optimizer, number)
    for phase, rows in expected.items():
        assert {row: size for row, size in found[phase].items() if size} == rows, phase
        assert sum(found[phase].values()) == counted[phase]  # nothing unexplained
    if method == "state":
        state = ["optim." + key for key in ("momentum_buffer", "exp_avg") if "optim." + key in found["final"]]
        assert found["final"][state[0]] < 0.35 * found["final"]["weights"]
    assert optimizer_bytes(count_bytes(find_owners(model, optimizer.state))) == optimizer_bytes(
        found["final" if method != "none" else "dense"]
    )


def test_what_dies_and_what_is_born_in_a_step_is_named():
    """Gradients of the step before, state made in the step, and a mask update that frees dense moments."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    optimizer = create_optimizer_v2(model, "adamwprune", lr=1e-3, sparsity=0.5, begin_step=1, end_step=3, frequency=1)
    for _ in range(2):
        probe = StepProbe(lambda: find_owners(model, optimizer.state))
        with probe:
            optimizer.zero_grad()
            loss = model(torch.randn(2, 64)).square().mean()
            probe.forward_done()
            loss.backward()
            probe.backward_done()
            optimizer.step()
    assert probe.part == "update"
    assert probe.rows["gradients"] == sum(p.nbytes for p in model.parameters())
    assert probe.rows["optim.exp_avg"] >= sum(p.nbytes for p in model.parameters())  # dense, and the first packed
