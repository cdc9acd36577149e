"""What timm's own tests/test_optim.py asks of each optimizer of its factory, asked of our names without pruning.

One difference is by design: sgdprune divides by 1 - momentum and refuses a momentum of 1.
"""

from copy import deepcopy

import pytest
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

import toolkit.optim  # noqa: F401
from toolkit.optim.registry import find_spec, specs

NAMES = [spec.name for spec in specs()]
ALL = [*NAMES, "lookahead_adamw-magnitude", "lookahead_sgd-movement"]
SGD = [name for name in NAMES if find_spec(name).family == "SGD"]

# How the parameters are given, and with what: groups with their own rate, a group alone, no rate, decay.
WAYS = {
    "list": lambda weight, bias: ([weight, bias], {"lr": 1e-3}),
    "groups": lambda weight, bias: ([{"params": [weight]}, {"params": [bias], "lr": 3e-3}], {"lr": 1e-3}),
    "one group": lambda weight, bias: ([{"params": bias, "lr": 3e-3}], {"lr": 1e-3}),
    "own rate alone": lambda weight, bias: ([{"params": bias, "lr": 3e-3}], {}),
    "decay": lambda weight, bias: ([weight, bias], {"lr": 1e-3, "weight_decay": 0.1}),
}


class Line:
    """The squared length of weight · input + bias, to be made small."""

    def __init__(self, name, way, gaps=False, **options):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(10, 5, 2, generator=generator)[..., 0]
        bias = torch.randn(10, 2, generator=generator)[..., 0]
        self.input = torch.randn(5, generator=generator)
        self.weight, self.bias = (nn.Parameter(tensor if gaps else tensor.clone()) for tensor in (weight, bias))
        assert self.weight.is_contiguous() != gaps
        parameters, given = WAYS[way](self.weight, self.bias)
        self.optimizer = create_optimizer_v2(parameters, name, **(given | options))

    def loss(self):
        self.optimizer.zero_grad()
        loss = (self.weight.mv(self.input) + self.bias).square().sum()
        loss.backward()
        return loss

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.step(self.loss)
        return self.loss().item()


def equal(a, b):
    """Whether two state dicts hold the same, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_class(name):
    assert issubclass(get_optimizer_class(name, bind_defaults=False), torch.optim.Optimizer)


@pytest.mark.parametrize("way", [*WAYS, "list, gaps between the weights"])
@pytest.mark.parametrize("name", ALL)
def test_the_loss_falls(name, way):
    line = Line(name, way.split(",")[0], gaps=way not in WAYS)
    assert type(line.optimizer).__name__ in repr(line.optimizer)
    before = line.loss().item()
    assert line.train(60) < before


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALL)
def test_a_loaded_state_goes_on_to_the_bit_and_is_given_back(name, way):
    line = Line(name, way)
    line.train(20)
    twin = Line(name, way)
    with torch.no_grad():
        twin.weight.copy_(line.weight)
        twin.bias.copy_(line.bias)
    kept = deepcopy(line.optimizer.state_dict())
    twin.optimizer.load_state_dict(kept)
    assert equal(kept, line.optimizer.state_dict())
    for _ in range(20):
        line.optimizer.step(line.loss)
        twin.optimizer.step(twin.loss)
        assert torch.equal(line.weight, twin.weight)
        assert torch.equal(line.bias, twin.bias)
    assert equal(line.optimizer.state_dict(), twin.optimizer.state_dict())
    copied = deepcopy(line.optimizer)
    assert {key for key in vars(copied) if key[0] != "_"} == {key for key in vars(line.optimizer) if key[0] != "_"}


@pytest.mark.parametrize("scheduler", [lambda optimizer: ExponentialLR(optimizer, 0.99), ReduceLROnPlateau])
@pytest.mark.parametrize("name", ["adamwprune", "sgdprune", "adamwspam-state", "adamw-movement"])
def test_under_a_schedule(name, scheduler):
    line = Line(name, "list")
    before, schedule = line.loss().item(), scheduler(line.optimizer)
    for _ in range(60):
        loss = line.optimizer.step(line.loss)
        schedule.step(*([loss] if isinstance(schedule, ReduceLROnPlateau) else []))
    assert line.loss().item() < before


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", SGD)
def test_strong_momentum(name, decay):
    if find_spec(name).is_ours:
        with pytest.raises(ValueError, match="momentum"):
            Line(name, "list", momentum=1)
    line = Line(name, "list", lr=1e-3, momentum=0.99, weight_decay=decay)
    before = line.loss().item()
    assert line.train(60) < before


@pytest.mark.parametrize("name", ALL)
def test_nearer_to_rosenbrocks_minimum_by_one_coordinate_at_a_time(name):
    place = nn.Parameter(torch.tensor([1.5, 1.5]))
    optimizer = create_optimizer_v2([place], name, lr=1e-3 if name in SGD or "_sgd" in name else 5e-2)

    def loss(coordinate):
        optimizer.zero_grad()
        value = (1 - place[0]) ** 2 + 100 * (place[1] - place[0] ** 2) ** 2
        value.backward()
        place.grad[1 - coordinate] = 0
        return value

    target = torch.ones(2)
    before = place.detach().dist(target)
    for step in range(600):
        optimizer.step(lambda step=step: loss(step % 2))
    assert place.detach().dist(target) <= before


@pytest.mark.parametrize("name", NAMES)  # lookahead goes back half the way every six steps
def test_a_small_model_gets_better_at_each_step(name):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    images = torch.arange(0.1, 0.65, 0.1).reshape(3, 2)
    optimizer = create_optimizer_v2(model, name, lr=1e-3 if name in SGD or "_sgd" in name else 5e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(images).sum()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses == sorted(set(losses), reverse=True)
