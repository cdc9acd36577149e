"""AdamWPrune in a LightningModule. Run: python examples/lightning_module.py"""

import lightning
import timm
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from toolkit.optim import AdamWPrune, param_groups


class Classifier(lightning.LightningModule):
    """A timm model that is pruned while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of one batch."""
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Steps are optimizer steps: with accumulation fewer than batches."""
        return AdamWPrune(
            param_groups(self.model),
            lr=1e-3,
            weight_decay=0.05,
            sparsity=0.7,
            begin_step=5,
            end_step=20,
            frequency=5,
        )


def main() -> tuple[int, int]:
    """Train; returns (zeros, prunable weights)."""
    lightning.seed_everything(0)
    data = TensorDataset(torch.randn(480, 3, 32, 32), torch.randint(10, (480,)))
    trainer = lightning.Trainer(
        max_epochs=1, gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=16, shuffle=True))
    zeros, weights = trainer.optimizers[0].pruning.sparsity()
    print(f"{zeros} of {weights} prunable weights are 0")
    return zeros, weights


if __name__ == "__main__":
    main()
