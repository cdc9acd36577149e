"""Weights, gradients and settings for the packed optimizers' tests."""

import torch
from torch import nn

from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.sgdprune import SGDPrune
from toolkit.prune.packing import span_offsets
from toolkit.prune.spans import make_spans

SHAPES = ((40, 20, 3, 3), (40,), (64, 50), (6, 30))
KINDS = [(AdamWPrune, {"lr": 1e-2}), (SGDPrune, {"lr": 1e-2, "weight_decay": 1e-2})]
PRUNING = {"sparsity": 0.8, "begin_step": 2, "end_step": 20, "frequency": 3}


def parameters(seed=0, layout=torch.contiguous_format, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    return [nn.Parameter(t.to(memory_format=layout) if t.ndim == 4 else t) for t in made]


def run(optimizer, weights, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(500 + step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()


def block_offsets(mask, numel):
    """Of a tensor that is one span."""
    return span_offsets(mask, make_spans(numel, []))


def prunable(weights):
    return [weight for weight in weights if weight.ndim > 1]


def zeros(weights):
    return sum(int((weight == 0).sum()) for weight in prunable(weights))


def total(weights):
    return sum(weight.numel() for weight in prunable(weights))
