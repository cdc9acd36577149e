"""AdamWPrune on several ranks through Accelerate, without train.py.

Run: accelerate launch --config_file accelerate_configs/cpu.yaml examples/accelerate_ddp.py
Gradients are the same on all ranks, so each rank prunes the same weights without a word to the others.
"""

import timm
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from toolkit.optim import AdamWPrune, param_groups


def main() -> tuple[int, int]:
    """Train; returns (zeros, prunable weights)."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = AdamWPrune(
        param_groups(model), lr=1e-3, weight_decay=0.05, sparsity=0.7, begin_step=5, end_step=20, frequency=5
    )
    data = TensorDataset(torch.randn(960, 3, 32, 32), torch.randint(10, (960,)))
    loader = DataLoader(data, batch_size=16, shuffle=True)
    model, wrapped, loader = accelerator.prepare(model, optimizer, loader)
    for images, labels in loader:
        accelerator.backward(cross_entropy(model(images), labels))
        wrapped.step()
        wrapped.zero_grad()
    zeros, weights = optimizer.pruning.sparsity()
    accelerator.print(f"{zeros} of {weights} prunable weights are 0")
    return zeros, weights


if __name__ == "__main__":
    main()
