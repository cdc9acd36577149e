"""On a GPU that only counts: tensors of two devices never meet, and the host waits and launches no more than said."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from fake_gpu import FakeGpu, counting, fake, resnet50_shapes
from packed import parameters
from timm.optim import create_optimizer_v2
from torch import nn

import toolkit.optim  # noqa: F401
from toolkit.kernels import triton_packed
from toolkit.prune.distributed import local_gradient
from toolkit.prune.options import PruningOptions
from toolkit.prune.packed_store import PackedStore
from toolkit.prune.scores import STATE_SCORES
from toolkit.prune.stores import Member
from toolkit.prune.update import update_masks

PRUNING = {"sparsity": 0.7, "begin_step": 1, "end_step": 6, "frequency": 2}  # dense 1, masks at 3, 5 and 6, packed 4
NAMES = ("adamwprune", "sgdprune", "adamw-magnitude", "adamw-movement", "adamwspam-state")


def train(name, on_gpu, steps=8, **options):
    """The weights after `steps`, and what each step was counted at."""
    weights = [nn.Parameter(weight.detach()) for weight in parameters()]
    if not name.endswith(("magnitude", "movement")):
        options["implementation"] = "reference"
    counts = []
    with FakeGpu() if on_gpu else nullcontext():
        if on_gpu:
            weights = [fake(weight) for weight in weights]
        optimizer = create_optimizer_v2(weights, name, lr=1e-2, weight_decay=1e-2, **PRUNING, **options)
        generator = torch.Generator().manual_seed(7)
        for _ in range(steps):
            for weight in weights:
                grad = torch.randn(weight.shape, generator=generator)
                weight.grad = fake(grad) if on_gpu else grad
            with counting() as count:
                optimizer.step()
            counts.append(count)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    return [weight.inner if on_gpu else weight.detach() for weight in weights], counts


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in NAMES), ("adamwprune", {"regrow": 0.3}), ("adamwprune", {"scope": "erk"})],
)
def test_trains_as_on_cpu_and_waits_at_mask_updates_alone(name, options):
    mine, counts = train(name, True, **options)
    with mock.patch("toolkit.kernels.native.fits", return_value=False):
        wanted, _ = train(name, False, **options)
    for one, other in zip(mine, wanted, strict=True):
        assert torch.equal(one, other)
    waits = [count.waits for count in counts]
    assert (waits[3], waits[6], waits[7]) == (0, 0, 0), counts
    assert max(waits) <= 40, max(counts, key=lambda count: count.waits)


@pytest.mark.parametrize("name", ["adamwprune", "sgdprune", "adamwspam-state"])
def test_what_the_host_does_for_a_kernel_never_waits(name):
    """The kernels themselves are left out. The first step after a mask update reads the counters, once."""
    called = []
    kernels = dict.fromkeys(triton_packed.KERNELS, lambda rows, *_, **__: called.append(len(rows)))
    with (
        FakeGpu(),
        mock.patch("torch.cuda.is_current_stream_capturing", return_value=False),
        mock.patch.object(triton_packed, "KERNELS", kernels),
    ):
        weights = [fake(nn.Parameter(weight.detach())) for weight in parameters()]
        optimizer = create_optimizer_v2(weights, name, lr=1e-2, **PRUNING)
        waits = []
        for _ in range(8):
            for weight in weights:
                weight.grad = torch.rand_like(weight)  # at a new address each time
            with counting() as count:
                optimizer.step()
            waits.append(count.waits)
    assert (waits[1], waits[3], waits[6], waits[7]) == (0, 1, 1, 0)
    assert called


def test_the_harness_tells_a_mismatch_and_a_wait():
    with FakeGpu(), counting() as count:
        here = torch.zeros(3, device="cuda")
        with pytest.raises(RuntimeError, match="several devices"):
            here + torch.ones(3)
        assert count.waits == 0
        here[here == 0]
        bool(here.sum())
        torch.tensor([1.0], device="cuda")
        assert count.waits == 3


def test_a_mask_update_of_resnet50():
    """Of its 54 prunable tensors: a first update, of dense moments, and one of packed moments."""
    shapes = [shape for shape in resnet50_shapes() if len(shape) > 1]
    assert len(shapes) == 54
    options = PruningOptions(sparsity=0.7, begin_step=0, end_step=10, frequency=1)
    store = PackedStore(STATE_SCORES["variance"], ("exp_avg", "exp_avg_sq"))
    generator = torch.Generator().manual_seed(0)
    with FakeGpu(), torch.no_grad():
        members = []
        for number, shape in enumerate(shapes):
            weight = fake(torch.rand(shape, generator=generator) + 0.1)
            weight.grad = weight.clone()
            state = {"exp_avg": weight.clone(), "exp_avg_sq": weight.clone()}
            members.append(Member(str(number), weight, state))
        for step in (2, 5):
            with counting() as count:
                assert update_masks(members, store, options, step, None)
            assert count.launches <= 3000, count
            assert count.waits <= 100, count


def test_hook_pruning_zeroes_all_tensors_in_a_few_launches():
    def launches(tensors):
        with FakeGpu():
            weights = [fake(nn.Parameter(torch.ones(16, 16) + number)) for number in range(tensors)]
            optimizer = create_optimizer_v2(weights, "sgd-magnitude", lr=0.1, **PRUNING)
            for _ in range(8):
                for weight in weights:
                    weight.grad = torch.ones_like(weight)
                with counting() as count:
                    optimizer.step()
            assert count.waits == 0, count
            return {name: n for name, n in count.ops.items() if "foreach" not in name}

    few, many = launches(4), launches(24)
    masking = ("masked_fill_", "cat", "__rshift__", "bitwise_not")
    assert {name: few[name] for name in masking} == {name: many[name] for name in masking}


def test_strides_of_axes_of_size_1_make_no_copy():
    """Of a depthwise weight under channels_last autograd may leave other strides than the weight's."""
    weight = nn.Parameter(torch.rand(8, 1, 3, 3))
    weight.grad = torch.rand(8, 3, 3, 1).as_strided((8, 1, 3, 3), (9, 1, 3, 1))
    assert weight.grad.stride() != weight.stride()
    assert local_gradient(weight, weight) is weight.grad
    other = nn.Parameter(torch.rand(8, 4, 3, 3))
    other.grad = torch.rand(8, 4, 3, 3).to(memory_format=torch.channels_last)
    assert local_gradient(other, other).stride() == other.stride()
