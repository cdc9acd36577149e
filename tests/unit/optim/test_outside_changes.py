"""What callers do to a model behind the optimizer's back: weights written, models cast, default dtypes changed."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from toolkit.kernels import compiled
from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.adamwspam import AdamWSPAM
from toolkit.optim.packed import PackedOptimizer
from toolkit.optim.sgdprune import SGDPrune
from toolkit.prune.hooks import pruned_by_hooks
from toolkit.prune.pruning import Pruning

KINDS = [AdamWPrune, SGDPrune, AdamWSPAM, pruned_by_hooks(torch.optim.AdamW, "magnitude")]
IMPLEMENTATIONS = ["auto", "reference"]
SCHEDULE = {"sparsity": 0.7, "end_step": 6, "frequency": 2}


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 9, 3), nn.Flatten(), nn.Linear(9 * 36, 7))


def train(net, optimizer, steps):
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def make(kind, net, implementation):
    more = {"implementation": implementation} if issubclass(kind, (AdamWPrune, SGDPrune)) else {}
    return kind(net.parameters(), lr=1e-2, **SCHEDULE, **more)


WAYS = {
    "load_state_dict": lambda net: net.load_state_dict(model(seed=5).state_dict()),
    "re-initialised": lambda net: net[2].reset_parameters(),
    "an average copied": lambda net: [p.data.copy_(p.data + 0.1) for p in net.parameters()],
    "one weight": lambda net: net[0].weight.data.view(-1).fill_(0.5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_weights_written_once_masks_exist_are_zeros_again_at_the_next_step(kind, implementation, way):
    net = model()
    optimizer = make(kind, net, implementation)
    train(net, optimizer, 8)
    zeros, weights = optimizer.pruning.sparsity()
    assert zeros == int(0.7 * weights)
    masks = [(parameter, mask.clone()) for parameter, mask in optimizer.pruning.masks()]
    WAYS[way](net)
    assert optimizer.pruning.sparsity()[0] < zeros
    train(net, optimizer, 1)
    assert optimizer.pruning.sparsity() == (zeros, weights)
    assert all(torch.equal(optimizer.state[parameter]["mask"], mask) for parameter, mask in masks)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_resumed_without_its_model_prunes_it(kind):
    net = model()
    optimizer = make(kind, net, "auto")
    train(net, optimizer, 8)
    other = model(seed=9)
    again = make(kind, other, "auto")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, again, 1)
    assert again.pruning.sparsity() == optimizer.pruning.sparsity()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_default_dtype_changes_nothing(dtype, kind, implementation):
    """Native code writes what a table says; a table of the default dtype was half as long as it should be."""
    plain, other = model(), model()
    first = make(kind, plain, implementation)
    train(plain, first, 9)
    try:
        torch.set_default_dtype(dtype)
        second = make(kind, other, implementation)
        for number in range(9):
            generator = torch.Generator().manual_seed(number)
            for parameter in other.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            second.step()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_counters_of_a_bfloat16_model_count_on():
    """bfloat16 cannot tell 256 from 257."""
    weight = nn.Parameter(torch.randn(12, 10, dtype=torch.bfloat16))
    try:
        torch.set_default_dtype(torch.bfloat16)
        optimizer = AdamWPrune([weight], lr=1e-3, sparsity=0.5, end_step=300, frequency=50)
        for _ in range(301):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert int(optimizer.state[weight]["step"]) == 301
    assert optimizer.pruning.sparsity() == (60, 120)


CAST = """
import torch
from torch import nn
from toolkit.optim import AdamWPrune
net = nn.Linear(2000, 500)
optimizer = AdamWPrune(net.parameters(), sparsity=0.5, end_step=2, frequency=1)
for step in range(6):
    if step == 4:
        net.bfloat16()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except ValueError as error:
        assert "cast or move the model before training" in str(error), error
        print("refused")
        break
"""


@pytest.mark.skipif(not compiled.available(), reason="no C++ compiler, so no native code")
def test_a_model_cast_after_packing_is_refused_without_asserts_too():
    done = subprocess.run([sys.executable, "-O", "-c", CAST], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "refused"), done.stderr


def test_a_step_that_is_a_number_loads():
    net = model()
    optimizer = make(AdamWPrune, net, "auto")
    train(net, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = float(state["step"])
    again = make(AdamWPrune, net, "auto")
    again.load_state_dict(saved)
    train(net, again, 1)
    assert all(int(state["step"]) == 4 for state in again.state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_save_is_equal(kind):
    net = model()
    optimizer = make(kind, net, "auto")
    train(net, optimizer, 5)
    saved = optimizer.state_dict()
    again = make(kind, net, "auto")
    again.load_state_dict(copy.deepcopy(saved))
    assert again.state_dict()["param_groups"] == saved["param_groups"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_keeps_zeros(kind):
    net = model()
    with torch.no_grad():
        net[2].weight[:, ::2] = 0.0
    zeros = int((net[2].weight == 0).sum())
    optimizer = make(kind, net, "auto")
    optimizer.pruning.keep_zeros()
    other, copied = copy.deepcopy((net, optimizer))
    train(other, copied, 1)
    assert int((other[2].weight == 0).sum()) == zeros


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("steps", [1, 8])  # dense, packed
@pytest.mark.parametrize("rows", [4, 200])
def test_a_parameter_of_another_size_is_an_error(kind, implementation, steps, rows):
    """Native code would write beyond what it has: shrunk and grown weights, before and after masks exist."""
    net = model()
    optimizer = make(kind, net, implementation)
    train(net, optimizer, steps)
    net[2].weight.data = torch.randn(rows, 9 * 36)
    with pytest.raises((ValueError, RuntimeError), match=r"another size|had stride|match|size of tensor"):
        train(net, optimizer, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_added_after_the_last_mask_update_are_not_left_dense_in_silence(kind):
    net = model()
    optimizer = make(kind, net[:1], "auto")
    train(net[:1], optimizer, 8)
    optimizer.add_param_group({"params": list(net[2].parameters())})
    with pytest.raises(ValueError, match="parameters were added since"):
        train(net, optimizer, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kept_zeros", [False, True])
def test_a_parameter_appended_by_hand_is_as_one_added(kind, implementation, kept_zeros):
    """Before end_step it is pruned with the others; after it, refused at the step that first has its gradient."""
    net = model()
    early, late = (make(kind, net[:1], implementation) for _ in range(2))
    if kept_zeros:
        early.pruning.keep_zeros()
        late.pruning.keep_zeros()
    train(net[:1], early, 3)
    early.param_groups[0]["params"].append(net[2].weight)
    train(net, early, 5)
    zeros, weights = early.pruning.sparsity()
    assert (zeros, weights) == (int(0.7 * weights), net[0].weight.numel() + net[2].weight.numel())
    train(net, early, 2)

    net[2].reset_parameters()
    net.zero_grad()
    train(net[:1], late, 8)
    late.param_groups[0]["params"].append(net[2].weight)
    with pytest.raises(ValueError, match="parameters were added since"):
        train(net, late, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_looked_at_once_past_end_step(kind, monkeypatch):
    looked = []
    monkeypatch.setattr(Pruning, "_check_arrived", lambda *_: looked.append(1))
    net = model()
    optimizer = make(kind, net, "auto")
    train(net, optimizer, 12)
    assert not looked  # the update at end_step knows
    monkeypatch.undo()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    check = Pruning._check_arrived
    monkeypatch.setattr(Pruning, "_check_arrived", lambda *given: looked.append(1) or check(*given))
    train(net, optimizer, 4)
    assert len(looked) == 1


OTHER_SHAPES = {
    "of another model": lambda value: torch.zeros(5, 4),
    "transposed": lambda value: value.transpose(0, 1).contiguous(),
    "flat": lambda value: value.flatten(),
    "one that would be spread": lambda value: value[:1],
    "a number": lambda value: value.flatten()[0],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_a_state_of_another_shape_names_the_parameter_and_changes_nothing(kind, shape):
    net = model()
    optimizer = make(kind, net, "auto")
    train(net, optimizer, 8)
    saved = optimizer.state_dict()
    keys = [key for key, value in saved["state"][2].items() if value.shape == net[2].weight.shape]
    assert "mask" in keys
    for key in keys if isinstance(optimizer, PackedOptimizer) else ["mask"]:  # other moments are the base's own affair
        wrong = copy.deepcopy(saved)
        wrong["state"][2][key] = OTHER_SHAPES[shape](wrong["state"][2][key])
        with pytest.raises(ValueError, match=rf"^parameter 2 has shape \(7, 324\), its {key} in .* the same order$"):
            optimizer.load_state_dict(wrong)
    undisturbed = copy.deepcopy(net)
    other = make(kind, undisturbed, "auto")
    other.load_state_dict(copy.deepcopy(saved))
    train(net, optimizer, 1)
    train(undisturbed, other, 1)
    assert all(map(torch.equal, net.parameters(), undisturbed.parameters()))
