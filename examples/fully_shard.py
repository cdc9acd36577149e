"""AdamWPrune under FSDP2: each rank holds rows of every weight, and the zeros are chosen over all of them.

Run: torchrun --nproc-per-node 2 examples/fully_shard.py
"""

import os

import timm
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from toolkit.optim import AdamWPrune, param_groups


def main() -> tuple[int, int]:
    """Train; returns (zeros, prunable weights) of the whole model."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(0)  # the same weights everywhere, before they are split
    model = timm.create_model("test_vit", img_size=32, num_classes=10).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AdamWPrune(  # after fully_shard, which makes other parameters
        param_groups(model), lr=1e-3, weight_decay=0.05, sparsity=0.7, begin_step=5, end_step=20, frequency=5
    )
    torch.manual_seed(1 + dist.get_rank())
    for _ in range(30):
        images, labels = torch.randn(16, 3, 32, 32, device=device), torch.randint(10, (16,), device=device)
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    zeros, weights = optimizer.pruning.sparsity()  # a collective: on every rank
    if dist.get_rank() == 0:
        print(f"{zeros} of {weights} prunable weights are 0")
    dist.destroy_process_group()
    return zeros, weights


if __name__ == "__main__":
    main()
