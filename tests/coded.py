"""A small model most of whose weights may be coded in 8 bits (its first layer is too small), and its gradients."""

import torch
from torch import nn


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.Conv2d(40, 33, 3, padding=1), nn.Flatten(), nn.Linear(33 * 16, 50)
    )


def take_gradients(net, number):
    generator = torch.Generator().manual_seed(number)
    images, labels = torch.randn(8, 3, 4, 4, generator=generator), torch.randint(0, 50, (8,), generator=generator)
    net.zero_grad()
    nn.functional.cross_entropy(net(images), labels).backward()
