"""ZeRO-1 and 2 with real DeepSpeed on gloo: exact sparsity, one rank's masks, dense moments really gone."""

import gc
import weakref

import pytest
import torch
from ranks import run_ranks
from torch import nn

from toolkit.engine.engines.zero import attach
from toolkit.optim.adamwprune import AdamWPrune

pytest.importorskip("deepspeed")


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 8))  # no padding at 2 ranks
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "prunable": True}, {"params": biases, "prunable": False}]
    optimizer = AdamWPrune(groups, lr=1e-2, sparsity=0.7, end_step=9, frequency=4, score="magnitude")
    return model, optimizer, weights


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(16, 20, generator=generator)).square().mean()


def _train(rank, stage):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for two minutes on first use, not needed
    model, optimizer, weights = build()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 16,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    attach(engine)
    dense = []
    for step in range(12):
        engine.backward(loss_of(engine, step))
        engine.step()
        if step == 2:
            dense = [
                weakref.ref(s["exp_avg"].untyped_storage())
                for s in optimizer.state.values()
                if s["exp_avg"].numel() > 200
            ]
            assert len(dense) == 1
            assert dense[0]() is not None
    gc.collect()
    return [p.detach().clone() for p in weights], [storage() is None for storage in dense]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero(stage):
    model, optimizer, weights = build()
    for step in range(12):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found, freed in run_ranks(_train, 2, stage):
        assert freed == [True]
        assert sum(int((p == 0).sum()) for p in found) == int(0.7 * sum(p.numel() for p in weights))
        for mine, wanted in zip(found, weights, strict=True):
            assert torch.equal(mine == 0, wanted == 0)
            torch.testing.assert_close(mine, wanted.detach(), rtol=1e-4, atol=1e-6)
