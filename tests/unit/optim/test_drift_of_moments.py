"""Second moments of few bits against float32's over 2,000 training steps on digit scans: the mean does not drift."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from toolkit.kernels.narrow import GROUP
from toolkit.optim import AdamWPrune


@pytest.mark.long
@pytest.mark.parametrize(("state_dtype", "scatter"), [("int8", 0.35), ("bfloat16", 0.08)])
def test_second_moments_do_not_drift_over_2000_training_steps(state_dtype, scatter):
    """AdamW with float32 moments trains; the coded ones are given its gradients.

    With an exponent of the exact largest, as before 2026-11-27, groups came to half of float32's.
    """
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    scans, digits = map(torch.tensor, load_digits(return_X_y=True))
    scans = scans.float().view(-1, 1, 8, 8) / 16
    stages = [(1, 32, 1), (32, 64, 2), (64, 64, 1)]
    layers = [
        layer
        for planes, features, stride in stages
        for layer in (nn.Conv2d(planes, features, 3, stride, 1), nn.BatchNorm2d(features), nn.ReLU())
    ]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    exact = torch.optim.AdamW(net.parameters(), lr=1e-3)
    weights = [p for p in net.parameters() if p.numel() >= 4096]
    shadows = [nn.Parameter(p.detach().clone()) for p in weights]
    coded = AdamWPrune(shadows, lr=0.0, weight_decay=0.0, state_dtype=state_dtype)
    for step in range(1, 2001):
        chosen = torch.randint(0, len(scans), (32,))
        exact.zero_grad()
        cross_entropy(net(scans[chosen]), digits[chosen], label_smoothing=0.1).backward()
        for weight, shadow in zip(weights, shadows, strict=True):
            shadow.grad = weight.grad.clone()
        exact.step()
        coded.step()
        if step % 500:
            continue
        kept = coded.state_dict()["state"]
        pairs = [
            (kept[i]["exp_avg_sq"].view(-1, GROUP), exact.state[weight]["exp_avg_sq"].view(-1, GROUP))
            for i, weight in enumerate(weights)
        ]
        ratio = torch.cat([mine / theirs for mine, theirs in pairs])
        groups = torch.cat([mine.sum(1) / theirs.sum(1) for mine, theirs in pairs])
        assert abs(ratio.mean() - 1) < 0.005, step
        assert ratio.log().std() < scatter, step
        assert groups.min() > 0.9, step
        assert groups.max() < 1.1, step
