"""The examples of several ranks. Here, for forks must come before autograd's threads in a test process."""

import importlib.util
import math
from pathlib import Path

import pytest
from ranks import run_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
RESNET, VIT = 371568, 295552


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _main(rank, name, *arguments):
    return load(name).main(*arguments)


@pytest.mark.parametrize(("name", "weights"), [("accelerate_ddp", RESNET), ("fully_shard", VIT)])
def test_several_ranks(name, weights):
    found = run_ranks(_main, 2, name, join_group=False)
    assert found == [(math.floor(0.7 * weights), weights)] * 2


def _without_compiling(rank, stage):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # two minutes on first use, for what gloo has
    return load("deepspeed_zero").main(stage)


def test_deepspeed():
    pytest.importorskip("deepspeed")
    found = run_ranks(_without_compiling, 2, 2, join_group=False)  # the other stages: test_attach.py
    assert found == [(math.floor(0.7 * VIT), VIT)] * 2
