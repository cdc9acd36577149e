"""The Triton kernels on a real GPU: equal to the reference, no wait for the device, and capturable in a graph."""

import pytest
import torch
from torch import nn

from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.sgdprune import SGDPrune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

SHAPES = ((64, 32, 3, 3), (64,), (256, 300), (6, 30))


def make(kind, implementation, steps, **options):
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).cuda()) for shape in SHAPES]
    optimizer = kind(
        weights, sparsity=0.8, begin_step=1, end_step=6, frequency=2, implementation=implementation, **options
    )
    for _ in range(steps):
        for weight in weights:
            grad = torch.randn(weight.shape, generator=generator).cuda()
            weight.grad = grad if weight.grad is None else weight.grad.copy_(grad)
        optimizer.step()
    return optimizer, weights


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamWPrune, {"lr": 1e-2}),
        (AdamWPrune, {"lr": 1e-2, "amsgrad": True, "decoupled_weight_decay": False}),
        (SGDPrune, {"lr": 1e-2, "nesterov": True}),
    ],
)
def test_equals_the_reference(kind, options):
    for mine, wanted in zip(
        make(kind, "triton", 20, **options)[1], make(kind, "reference", 20, **options)[1], strict=True
    ):
        assert torch.equal(mine == 0, wanted == 0)
        assert (mine - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_step_does_not_wait_for_the_gpu():
    optimizer, _ = make(AdamWPrune, "triton", 8, lr=1e-2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_counts_on():
    captured, weights = make(AdamWPrune, "triton", 8, lr=1e-2)
    eager, wanted = make(AdamWPrune, "triton", 8, lr=1e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
        eager.step()
    for mine, theirs in zip(weights, wanted, strict=True):
        assert torch.equal(mine, theirs)
