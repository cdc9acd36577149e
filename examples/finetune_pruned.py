"""Fine-tuning a model that is pruned already, so that its zeros stay zeros. Run: python examples/finetune_pruned.py"""

import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from toolkit.optim import AdamWPrune, param_groups


def finetune(model: nn.Module, sparsity: float) -> AdamWPrune:
    """Train on; the weights that are 0 now stay out from the first step, and keep no moments."""
    optimizer = AdamWPrune(param_groups(model), lr=1e-4, sparsity=sparsity, end_step=1)
    optimizer.pruning.keep_zeros()
    for _ in range(10):
        images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def main() -> tuple[int, int]:
    """Prune each layer's smallest weights by hand, fine-tune; returns (zeros, prunable weights)."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    for module in model.modules():  # in place of a checkpoint that came pruned
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach().flatten()
            weight[weight.abs().argsort()[: round(0.7 * len(weight))]] = 0
    optimizer = finetune(model, sparsity=0.6)  # at most what it has, so that nothing more goes
    zeros, weights = optimizer.pruning.sparsity()
    print(f"{zeros} of {weights} prunable weights are 0")
    return zeros, weights


if __name__ == "__main__":
    main()
