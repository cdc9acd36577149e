"""Synchronised BatchNorm under every engine on two GPUs over NCCL: torch has no kernel of it for the CPU."""

import os

import pytest
import torch
from engines import ENGINES
from flags import train_flags
from ranks import run_ranks

from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.loop import train as train_loop

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="SyncBatchNorm needs two GPUs")


def train(rank, environment, flags):
    os.environ.update(environment)
    run = build(parse(flags))
    history = train_loop(run)
    return history.train_loss


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
def test_statistics_are_those_of_ddp(few_digits, tmp_path, engine):
    pytest.importorskip("deepspeed")
    flags = train_flags(few_digits, tmp_path, "--opt", "adamw", "--sync-bn", "--epochs", "1")
    wanted, found = (
        run_ranks(train, 2, ENGINES[name], [*flags, "--experiment", name], join_group=False)[0]
        for name in ("ddp", engine)
    )
    assert found == pytest.approx(wanted, rel=1e-3)
