"""Rules for layers on FSDP2's shards. (Ranks that run backward are forked before autograd has threads: not in unit.)"""

import torch
from ranks import run_ranks
from torch import nn

from toolkit.optim import AdamWPrune, param_groups

NAMES, SIZES = ("stem", "one", "two", "three", "head"), (8, 12, 16, 8, 4, 4)


def _sharded(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    model = nn.Sequential()
    for name, inputs, outputs in zip(NAMES, SIZES[:-1], SIZES[1:], strict=True):
        model.add_module(name, nn.Linear(inputs, outputs))
    if rank >= 0:
        fully_shard(model)
    rules = {"stem": "skip", "three": {"sparsity": 0.9, "score": "magnitude"}, "two": {"pattern": "2:4"}}
    optimizer = AdamWPrune(param_groups(model, rules=rules), lr=1e-2, sparsity=0.6, end_step=6, frequency=2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(5, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [(p == 0).tolist() for p in whole], optimizer.pruning.sparsity()


def test_shards_of_two_ranks_have_the_masks_of_one():
    wanted = _sharded(-1)
    assert run_ranks(_sharded, 2) == [wanted, wanted]
