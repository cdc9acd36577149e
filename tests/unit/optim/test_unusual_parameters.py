"""Parameters of low precision, with gaps in memory, without anything to prune, or under Lookahead."""

import pytest
import timm.optim
import torch
from torch import nn

import toolkit.optim  # noqa: F401  registers the names
from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.adamwspam import AdamWSPAM
from toolkit.optim.sgdprune import SGDPrune
from toolkit.prune.hooks import pruned_by_hooks

PACKED = [AdamWPrune, SGDPrune, AdamWSPAM]
KINDS = [*PACKED, pruned_by_hooks(torch.optim.AdamW, "magnitude")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_moments_have_the_dtype_that_was_asked_for_and_stay_true(dtype, state_dtype, sparsity):
    """v falls from 1 to its new mean in steps of a thousandth, which bfloat16 cannot take but by chance."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=dtype))
    pruning = {"sparsity": sparsity, "end_step": 20, "frequency": 10} if sparsity else {}
    optimizer = AdamWPrune([weight], lr=1e-4, state_dtype=state_dtype, **pruning)
    for step in range(1500):
        weight.grad = torch.full_like(weight, 1.0 if step < 500 else 0.1)
        optimizer.step()
    second = optimizer.state[weight]["exp_avg_sq"]
    assert second.dtype == getattr(torch, state_dtype)
    assert float(second.double().mean()) == pytest.approx(0.1512, abs=2e-3)


@pytest.mark.parametrize("state_dtype", [None, "float32", "bfloat16"])
def test_moments_of_a_bfloat16_model_are_loaded_as_they_were(state_dtype):
    weight = nn.Parameter(torch.randn(20, 10).bfloat16())
    optimizer = AdamWPrune([weight], state_dtype=state_dtype, sparsity=0.5, end_step=4, frequency=1)
    for step in range(6):
        weight.grad = torch.randn(20, 10, generator=torch.Generator().manual_seed(step)).bfloat16()
        optimizer.step()
    again = AdamWPrune([weight], state_dtype=state_dtype, sparsity=0.5, end_step=4, frequency=1)
    again.load_state_dict(optimizer.state_dict())
    for key, value in optimizer.state[weight].items():
        assert again.state[weight][key].dtype == value.dtype
        assert torch.equal(again.state[weight][key], value)


@pytest.mark.parametrize(
    ("kind", "plain", "more"), [(AdamWPrune, torch.optim.AdamW, {}), (SGDPrune, torch.optim.SGD, {"momentum": 0.9})]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_parameter_with_gaps_is_updated_as_by_torch(kind, plain, more, dtype):
    storages = [torch.randn(6, 20, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(2)]
    mine, theirs = (nn.Parameter(storage[:, ::2]) for storage in storages)
    optimizer, reference = kind([mine], lr=1e-2), plain([theirs], lr=1e-2, foreach=False, **more)
    for step in range(5):
        grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(step)).to(dtype)
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_prune_is_an_error(kind):
    vectors = [nn.Parameter(torch.randn(5))]
    with pytest.raises(ValueError, match="no parameter is prunable"):
        kind(vectors, sparsity=0.5, end_step=5)
    kind(vectors, sparsity=0.0)


@pytest.mark.parametrize("name", ["adamwprune", "sgdprune", "adamw-state", "adamw-magnitude"])
def test_lookahead_is_refused_at_the_first_step(name):
    weight = nn.Parameter(torch.randn(8, 6))
    optimizer = timm.optim.create_optimizer_v2([weight], f"lookahead_{name}", lr=1e-2, sparsity=0.5, end_step=5)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="Lookahead revives pruned weights"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_update_that_asks_for_nothing_needs_no_score(kind):
    """Layers that are unfrozen step by step have no gradient when the schedule begins, at 0 zeros."""
    early, late = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
    optimizer = kind([early, late], sparsity=0.5, begin_step=2, end_step=12, frequency=5)
    for step in range(12):
        early.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        late.grad = early.grad.clone() if step > 3 else None
        optimizer.step()
    assert optimizer.pruning.sparsity() == (64, 128)
