"""--grad-checkpointing changes memory and time, and not one bit of the result."""

import copy

import pytest
import timm
import torch

from toolkit.builder.recompute import checkpoint_activations


def train(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1)  # of dropout, which the second forward pass must repeat
    for step in range(steps):
        images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet"])
def test_weights_and_running_statistics_are_the_same(name):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5).train()
    checkpointed, careless = copy.deepcopy(plain), copy.deepcopy(plain)
    checkpoint_activations(checkpointed, name)
    careless.set_grad_checkpointing(True)
    wanted = train(plain)
    found, wrong = train(checkpointed), train(careless)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not all(torch.equal(wrong[key], wanted[key]) for key in wanted)  # the trap is real


def test_a_model_without_it_says_so():
    with pytest.raises(ValueError, match="linear does not offer it"):
        checkpoint_activations(torch.nn.Linear(2, 2), "linear")


def test_synchronised_batch_norms_are_watched_too():
    from types import SimpleNamespace

    from toolkit.builder.model import place_model

    model = timm.create_model("resnet10t")
    config = SimpleNamespace(sync_bn=True, grad_checkpointing=True, channels_last=False, model="resnet10t")
    place_model(model, config, SimpleNamespace(num_ranks=2, device=torch.device("cpu")))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(norm._forward_pre_hooks for norm in norms)
