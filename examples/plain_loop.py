"""AdamWPrune in a plain PyTorch loop. Needs `pip install .` alone. Run: python examples/plain_loop.py"""

import timm
import torch
from torch.nn.functional import cross_entropy

from toolkit.optim import AdamWPrune, param_groups

STEPS = 30


def main() -> tuple[int, int]:
    """Train; returns (zeros, prunable weights)."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = AdamWPrune(
        param_groups(model),  # convolution and linear weights are pruned; norms and biases do not decay
        lr=1e-3,
        weight_decay=0.05,
        sparsity=0.7,
        begin_step=5,  # in optimizer steps: 500 and 6,000 rather, in a run of 10,000
        end_step=20,
        frequency=5,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    zeros, weights = optimizer.pruning.sparsity()
    print(f"{zeros} of {weights} prunable weights are 0")
    return zeros, weights


if __name__ == "__main__":
    main()
