import torch
from torch import nn

from toolkit.memory.ledger import count_bytes, find_owners, optimizer_bytes


def test_each_storage_counts_once():
    model = nn.Linear(4, 4, bias=False)
    model.register_buffer("alias", model.weight.detach()[:2])
    model.weight.grad = torch.zeros(100).narrow(0, 10, 16).view(4, 4)  # a view, as DDP's bucket views are
    state = {model.weight: {"exp_avg": torch.zeros(16), "exp_avg_sq": torch.zeros(16), "step": torch.tensor(1.0)}}
    state[model.weight]["mask"] = state[model.weight]["exp_avg"].view(torch.uint8)
    ledger = count_bytes(find_owners(model, state))
    assert ledger["weights"] == 64
    assert ledger["buffers"] == 0
    assert ledger["gradients"] == 400
    assert ledger["optim.exp_avg"] == 64
    assert ledger["masks"] == 0
    assert optimizer_bytes(ledger) == 64 + 64 + 4


def test_ema_and_buckets():
    model, ema = nn.Linear(3, 3), nn.Linear(3, 3)
    bucket = torch.zeros(64)
    model.weight.grad, model.bias.grad = bucket[:9].view(3, 3), bucket[9:12]
    ledger = count_bytes(find_owners(model, {}, ema=ema, in_buckets=True))
    assert ledger["ema"] == 48
    assert ledger["gradients"] == 0
    assert ledger["ddp_buckets"] == 256
