import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import toolkit.optim  # noqa: F401
from toolkit.build.optimizer import predict_memory
from toolkit.memory.ledger import optimizer_bytes, tensor_ledger
from toolkit.optim.registry import specs

NAMES = [(spec.name, spec.method, score) for spec in specs()
         for score in ([None, "displacement"] if spec.method == "movement" else [None])]  # fmt: skip


@pytest.mark.parametrize(("name", "method", "score"), NAMES)
def test_state_bytes_equal_the_arithmetic(name, method, score):
    """Every optimizer × pruning, to the byte, at final sparsity."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    pruning = {} if method == "none" else {"sparsity": 0.7, "end_step": 3, "frequency": 1}
    if score:
        pruning["score"] = score
    optimizer = create_optimizer_v2(model, name, lr=1e-3, weight_decay=1e-2, **pruning)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2])).backward()
        optimizer.step()
    measured = tensor_ledger(model, optimizer.state)
    predicted = predict_memory(model, optimizer, name, method, score, None)
    assert measured == predicted
    if method == "state":
        assert measured["masks"] > 0
        moment = "momentum_buffer" if name == "sgdprune" else "exp_avg"
        assert measured[f"optim.{moment}"] < 0.35 * measured["weights"]


def test_each_storage_counts_once():
    model = nn.Linear(4, 4, bias=False)
    model.register_buffer("alias", model.weight.detach()[:2])
    model.weight.grad = torch.zeros(100).narrow(0, 10, 16).view(4, 4)  # a view, as DDP's bucket views are
    state = {model.weight: {"exp_avg": torch.zeros(16), "exp_avg_sq": torch.zeros(16), "step": torch.tensor(1.0)}}
    state[model.weight]["mask"] = state[model.weight]["exp_avg"].view(torch.uint8)
    ledger = tensor_ledger(model, state)
    assert ledger["weights"] == 64
    assert ledger["buffers"] == 0
    assert ledger["gradients"] == 400
    assert ledger["optim.exp_avg"] == 64
    assert ledger["masks"] == 0
    assert optimizer_bytes(ledger) == 64 + 64 + 4


def test_ema_and_separate_buckets():
    model, ema = nn.Linear(3, 3), nn.Linear(3, 3)
    model.weight.grad, model.bias.grad = torch.zeros(3, 3), torch.zeros(3)
    ledger = tensor_ledger(model, {}, ema=ema, separate_buckets=True)
    assert ledger["ema"] == 48
    assert ledger["ddp_buckets"] == 48
