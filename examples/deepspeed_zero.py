"""AdamWPrune under DeepSpeed's ZeRO-1, 2 or 3. Needs `pip install '.[train,deepspeed]'`.

Run: torchrun --nproc-per-node 2 examples/deepspeed_zero.py --stage 2
ZeRO shows an optimizer flat slices instead of parameters; `attach` says what lies where, and on which ranks.
"""

import argparse
import os

import deepspeed
import timm
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from toolkit.engine.engines.zero import attach
from toolkit.optim import AdamWPrune, param_groups


def main(stage: int) -> tuple[int, int]:
    """Train; returns (zeros, prunable weights) of the whole model."""
    on_gpu = torch.cuda.is_available()
    deepspeed.init_distributed("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    optimizer = AdamWPrune(
        param_groups(model), lr=1e-3, weight_decay=0.05, sparsity=0.7, begin_step=5, end_step=20, frequency=5
    )
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, _, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attach(engine)
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(30):
        images, labels = torch.randn(16, 3, 32, 32, device=device), torch.randint(10, (16,), device=device)
        engine.backward(cross_entropy(engine(images), labels))
        engine.step()
    zeros, weights = optimizer.pruning.sparsity()  # a collective: on every rank
    if dist.get_rank() == 0:
        print(f"{zeros} of {weights} prunable weights are 0")
    return zeros, weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2)
    main(parser.parse_args().stage)
