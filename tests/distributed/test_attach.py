"""The public call for DeepSpeed without train.py: one rank's masks and exact sparsity, or a refusal in one line."""

from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from torch import nn

from toolkit.engine.engines.zero import attach
from toolkit.optim import AdamWPrune, param_groups

deepspeed = pytest.importorskip("deepspeed")


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 33), nn.Tanh(), nn.Linear(33, 7))  # slices begin within a weight
    options = {"lr": 1e-2, "sparsity": 0.7, "end_step": 9, "frequency": 4, "score": "magnitude"}
    return model, AdamWPrune(param_groups(model), **options)


def loss_of(model, step):
    return model(torch.randn(16, 20, generator=torch.Generator().manual_seed(step))).square().mean()


def _train(rank, stage):
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # two minutes of compiling, not needed
    model, optimizer = build()
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, dist_init_required=False, config=config)
    attach(engine)
    for step in range(12):
        engine.backward(loss_of(engine, step))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights, optimizer.pruning.sparsity()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_attached_zero_prunes_as_one_rank_does(stage):
    model, optimizer = build()
    for step in range(12):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    zeros = int(0.7 * (20 * 33 + 33 * 7))
    for weights, counted in run_ranks(_train, 2, stage):
        assert counted == (zeros, 20 * 33 + 33 * 7)
        for name, wanted in model.named_parameters():
            if wanted.ndim > 1:
                assert torch.equal(weights[name] == 0, wanted == 0), name
            torch.testing.assert_close(weights[name], wanted.detach(), rtol=1e-4, atol=1e-6)


def fake_engine(stage=2, ranks=1, scope="global", marks=(True,)):
    pruning = SimpleNamespace(schedule=SimpleNamespace(enabled=True), options=SimpleNamespace(scope=scope))
    base = SimpleNamespace(pruning=pruning, param_groups=[{"params": [], "prunable": mark} for mark in marks])
    return SimpleNamespace(
        optimizer=SimpleNamespace(optimizer=base),
        zero_optimization_stage=lambda: stage,
        module=nn.Linear(2, 2),
        device=torch.device("cpu"),
        dp_world_size=ranks,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stage": 0}, "stage 0 with mixed precision"),
        ({"ranks": 2}, "2 of 1 ranks as data parallel"),
        ({"scope": "layer"}, "scope='layer'"),
        ({"marks": (False,)}, "0 groups marked prunable"),
        ({"marks": (True, True)}, "2 groups marked prunable"),
    ],
)
def test_what_zero_cannot_do_is_refused(options, words):
    with pytest.raises(ValueError, match=rf"does not go with (zero_optimization )?{words}.*use FSDP2 or DDP"):
        attach(fake_engine(**options))


def test_without_pruning_there_is_nothing_to_tell():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    engine = fake_engine(stage=0)
    engine.optimizer = SimpleNamespace(optimizer=optimizer)
    attach(engine)
