"""The Triton kernels on a real GPU: equal to the reference, no wait for the device, and capturable in a graph."""

import pytest
import torch
from masks import check_masks, watch_mask_updates
from torch import nn

from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.adamwspam import AdamWSPAM
from toolkit.optim.sgdprune import SGDPrune

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

# A handful of ResNet-50's: stem, a 3x3, a 1x1, a norm and the classifier; no multiple of 1,024 in the first.
RESNET50 = ((64, 3, 7, 7), (512, 512, 3, 3), (2048, 512, 1, 1), (2048,), (1000, 2048))
SHAPES = ((64, 32, 3, 3), (64,), (256, 300), (6, 30))


def make(kind, implementation, steps, shapes=SHAPES, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype)) for shape in shapes]
    optimizer = kind(
        weights, sparsity=0.8, begin_step=1, end_step=6, frequency=2, implementation=implementation, **options
    )
    optimizer.mask_updates = watch_mask_updates(optimizer)
    for _ in range(steps):
        for weight in weights:
            grad = torch.randn(weight.shape, generator=generator).to("cuda", dtype)
            weight.grad = grad if weight.grad is None else weight.grad.copy_(grad)
        optimizer.step()
    return optimizer, weights


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamWPrune, {"lr": 1e-2}),
        (AdamWPrune, {"lr": 1e-2, "amsgrad": True, "decoupled_weight_decay": False}),
        (SGDPrune, {"lr": 1e-2, "nesterov": True}),
    ],
)
def test_equals_the_reference(kind, options):
    compare(*(make(kind, how, 20, **options) for how in ("triton", "reference")), 1e-5, swaps=1e-4)


def compare(made, reference, tolerance, swaps, dtype=torch.float32):
    """Weights alike where both survive. Masks too, but for the share `swaps`, and that at the threshold alone.

    Moments differ in their last place before a mask update, so two weights beside the threshold may change places.
    """
    (optimizer, mine), (other_optimizer, wanted) = made, reference
    check_masks(optimizer.mask_updates, other_optimizer.mask_updates, dtype)
    differing, weights = 0, 0
    for one, other in zip(mine, wanted, strict=True):
        one, other = one.detach().float(), other.detach().float()
        kept = (one != 0) & (other != 0)
        differing += int(((one == 0) != (other == 0)).sum())
        weights += one.numel()
        distance = (one - other)[kept].norm() / other.norm()
        assert distance <= tolerance, f"{tuple(one.shape)}: {distance:.2e}"
    assert differing <= swaps * weights, f"{differing} of {weights} masks differ"


def test_a_step_does_not_wait_for_the_gpu():
    optimizer, _ = make(AdamWPrune, "triton", 8, lr=1e-2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
def test_a_captured_step_counts_on(state_dtype):
    """Chances too, by which narrow moments are rounded: their seed is made of the counter on the device."""
    captured, weights = make(AdamWPrune, "triton", 8, lr=1e-2, state_dtype=state_dtype)
    eager, wanted = make(AdamWPrune, "triton", 8, lr=1e-2, state_dtype=state_dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
        eager.step()
    for mine, theirs in zip(weights, wanted, strict=True):
        assert torch.equal(mine, theirs)
        for key, value in captured.state[mine].items():
            assert torch.equal(value, eager.state[theirs][key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", [AdamWPrune, SGDPrune, AdamWSPAM])
def test_equals_the_reference_at_the_shapes_of_resnet50(kind, state_dtype, dtype):
    """8 steps: dense, three mask updates, packed."""
    options = {"shapes": RESNET50, "dtype": dtype, "state_dtype": state_dtype, "lr": 1e-2}
    rounded = dtype is torch.bfloat16 or state_dtype != "float32"
    made = [make(kind, how, 8, **options) for how in ("triton", "reference")]
    limits = (2e-2, 2e-2, torch.bfloat16) if rounded else (1e-5, 1e-4, torch.float32)
    compare(*made, *limits)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_bfloat16_weights_are_rounded_to_the_bits_of_the_reference(state_dtype):
    """By a rule without rounding of its own: at step 1 the buffer is the gradient."""
    options = {"shapes": RESNET50, "dtype": torch.bfloat16, "state_dtype": state_dtype, "lr": 0.5, "momentum": 0.5}
    (_, mine), (_, wanted) = (make(SGDPrune, how, 1, **options) for how in ("triton", "reference"))
    assert all(map(torch.equal, mine, wanted))


@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16"}, {"state_dtype": "int8"}, {"amsgrad": True}])
def test_twenty_steps_do_not_wait_for_the_gpu(options):
    """Gradients anew each step, at other addresses: the table is copied, and nobody waits for it."""
    optimizer, weights = make(AdamWPrune, "triton", 8, lr=1e-2, **options)
    optimizer.step()  # sorts the parameters anew after the last mask update
    torch.cuda.synchronize()
    kept = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            kept.append([weight.grad for weight in weights])  # so that no address comes twice
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(weight.isfinite().all() for weight in weights)


def trained(steps, capture):
    """Weights of a small model after `steps` whole steps, forward to update, replayed or eager."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 200), nn.ReLU(), nn.Linear(200, 40)).cuda()
    images = torch.randn(32, 96, device="cuda")
    optimizer = AdamWPrune(model.parameters(), lr=torch.tensor(1e-2, device="cuda"), sparsity=0.7, end_step=3)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(images).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(6):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    if capture:
        with torch.cuda.graph(graph):
            step()
        graph.replay()
    else:
        step()
    taken = []
    for number in range(steps):
        if number == steps // 2:
            step()  # an eager one between, with gradients elsewhere
        elif capture:
            taken.extend(torch.full((18,), -1).pin_memory() for _ in range(8))  # memory of tables that were let go
            graph.replay()
        else:
            step()
    torch.cuda.synchronize()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_whole_captured_step_replays_as_eager_ones():
    for mine, wanted in zip(trained(9, capture=True), trained(9, capture=False), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_two_streams_update_two_models():
    alone = [make(AdamWPrune, "triton", 8, lr=1e-2) for _ in range(2)]
    beside = [make(AdamWPrune, "triton", 8, lr=1e-2) for _ in range(2)]
    for _ in range(10):
        for optimizer, _ in alone:
            optimizer.step()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in beside]
    for _ in range(10):
        for stream, (optimizer, _) in zip(streams, beside, strict=True):
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for (_, mine), (_, wanted) in zip(beside, alone, strict=True):
        assert all(map(torch.equal, mine, wanted))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here")
def test_a_model_over_two_gpus_is_updated_on_both():
    _, weights = make(AdamWPrune, "triton", 0, lr=1e-2)
    weights[1::2] = [nn.Parameter(weight.detach().to("cuda:1")) for weight in weights[1::2]]
    optimizer = AdamWPrune(weights, lr=1e-2, sparsity=0.5, end_step=2)
    for _ in range(5):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert all(weight.isfinite().all() for weight in weights)
    zeros, prunable = optimizer.pruning.sparsity()
    assert zeros == prunable // 2
