"""Weights that never get a gradient are told of, on every engine that keeps gradients, and only they."""

import os
import re

import pytest
import timm
import torch
from engines import ENGINES
from flags import train_flags
from ranks import run_ranks

import train

WARNING = re.compile(
    r"([\d,]+) of ([\d,]+) prunable weights .* gradient of exactly 0 at step (\d+).* ([\d.]+) % of the"
)
PRUNED = ("--sparsity", "0.7", "--prune-begin", "0.6", "--prune-end", "0.9", "--experiment", "r")


def counted(size):
    """(weights without gradient in any of three starts, weights) of test_resnet at images of so many pixels.

    Its last BatchNorms are not at 0, and a unit that is silent in one start is not in all.
    """
    never = None
    for seed in range(3):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=10)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.ones_(module.weight)
        model(torch.randn(64, 3, size, size)).square().sum().backward()
        silent = torch.cat([weight.grad.flatten() == 0 for weight in model.parameters() if weight.ndim > 1])
        never = silent if never is None else never & silent
    return int(never.sum()), never.numel()


def run(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    assert train.main(flags) == 0


@pytest.mark.parametrize(
    ("engine", "ranks", "opt"),
    [("ddp", 1, ["adamwprune"]), ("ddp", 2, ["adamw", "--pruning", "magnitude"]), ("fsdp2", 2, ["adamwprune"])],
)
def test_kernels_that_meet_padding_are_told_of(few_digits, tmp_path, engine, ranks, opt):
    flags = train_flags(few_digits, tmp_path, *PRUNED, "--opt", *opt)
    run_ranks(run, ranks, engine, flags, join_group=False)
    log = (tmp_path / "r" / "train.log").read_text()
    idle, weights, step, taken = WARNING.search(log).groups()
    wanted_idle, wanted_weights = counted(32)
    idle = int(idle.replace(",", ""))
    assert wanted_idle <= idle < 1.05 * wanted_idle  # a few units may be silent in one step
    assert (int(weights.replace(",", "")), int(step)) == (wanted_weights, 10)
    assert float(taken) == pytest.approx(100 * (1 - 0.3 * wanted_weights / (wanted_weights - idle)), abs=0.1)
    assert log.count("gradient of exactly 0") == 1


def test_nothing_is_told_where_all_learn(few_digits, tmp_path):
    assert counted(64)[0] == 0
    flags = train_flags(few_digits, tmp_path, *PRUNED, "--opt", "adamwprune", "--img-size", "64")
    assert train.main(flags) == 0
    assert "gradient of exactly 0" not in (tmp_path / "r" / "train.log").read_text()
