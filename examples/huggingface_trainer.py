"""AdamWPrune in Hugging Face's Trainer, on a small GPT-2. Run: python examples/huggingface_trainer.py

Groups given as `params` take the place of the Trainer's own, which know no mark: without them it would prune the
embeddings too, and the head tied to them. Learning rate and weight decay are the optimizer's arguments, not the
Trainer's.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from toolkit.optim import AdamWPrune, param_groups


def main() -> tuple[int, int]:
    """Train; returns (zeros, prunable weights)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (64, 16))]
    settings = {"lr": 1e-3, "weight_decay": 0.05, "sparsity": 0.7, "begin_step": 5, "end_step": 20, "frequency": 5}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder, max_steps=30, per_device_train_batch_size=8, report_to="none", save_strategy="no"
            ),
            train_dataset=data,
            optimizer_cls_and_kwargs=(AdamWPrune, {"params": param_groups(model), **settings}),
        )
        trainer.train()
    zeros, weights = trainer.optimizer.optimizer.pruning.sparsity()  # the Trainer's is Accelerate's wrapper
    print(f"{zeros} of {weights} prunable weights are 0")
    return zeros, weights


if __name__ == "__main__":
    main()
