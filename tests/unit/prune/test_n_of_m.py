"""N:M: exact in groups at every update, the cheapest first, whatever the memory layout, the method and the pieces."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from toolkit.optim import AdamWPrune, param_groups
from toolkit.optim.sgdprune import SGDPrune
from toolkit.prune import select
from toolkit.prune.hooks import pruned_by_hooks
from toolkit.prune.mask import flat_view, unpack_bits
from toolkit.prune.patterns import NOfM, group_costs, n_of_m, neighbour_distance
from toolkit.prune.spans import Range

METHODS = {
    "state": lambda params, **options: AdamWPrune(params, lr=1e-2, **options),
    "sgd-state": lambda params, **options: SGDPrune(params, lr=1e-2, momentum=0.9, **options),
    "int8": lambda params, **options: AdamWPrune(params, lr=1e-2, state_dtype="int8", **options),
    **{
        score: lambda params, score=score, **options: pruned_by_hooks(
            torch.optim.AdamW, "magnitude" if score == "magnitude" else "movement"
        )(params, lr=1e-2, score=score, **options)
        for score in ("magnitude", "movement", "displacement")
    },
}
PATTERNS = ("2:4", "1:4", "4:8", "1:2", "2:3", "3:16")


def weights(pattern, outputs, multiple, kernel, layout, seed):
    """A linear weight and a convolution's, made of whole groups."""
    size = n_of_m(pattern).size
    generator = torch.Generator().manual_seed(seed)
    linear = torch.randn(outputs, size * multiple, generator=generator)
    conv = torch.randn(outputs + 1, size * multiple, *kernel, generator=generator)
    if layout == "channels_last":
        conv = conv.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        linear = linear.T.contiguous().T
    return [nn.Parameter(linear), nn.Parameter(conv)]


def steps(optimizer, parameters, seed, number):
    """Steps with random gradients, of which each is told when it is made."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, number + 1):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        yield step


def survivors(optimizer, parameter):
    """bool, shaped like the parameter: the mask."""
    keep = torch.empty_like(parameter, dtype=torch.bool)
    flat_view(keep).copy_(unpack_bits(optimizer.state[parameter]["mask"], parameter.numel()))
    return keep


def left_in_groups(keep, size):
    return keep.view(keep.shape[0], -1, size, *keep.shape[2:]).sum(2)


@pytest.mark.parametrize("method", METHODS)
@given(
    pattern=st.sampled_from(PATTERNS),
    outputs=st.integers(1, 5),
    multiple=st.integers(1, 4),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    layout=st.sampled_from(["plain", "channels_last", "transposed"]),
    scope=st.sampled_from(["global", "layer", "erk"]),
    chunk=st.sampled_from([8, 100, select.CHUNK]),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_every_update_is_exact_in_groups(method, pattern, outputs, multiple, kernel, layout, scope, chunk, seed):
    parameters = weights(pattern, outputs, multiple, kernel, layout, seed)
    optimizer = METHODS[method](
        [{"params": parameters, "prunable": True}], pattern=pattern, end_step=9, frequency=3, scope=scope
    )
    kind, total = n_of_m(pattern), sum(p.numel() for p in parameters)
    groups = total // kind.size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "CHUNK", chunk)
        for step in steps(optimizer, parameters, seed, 11):
            if step not in (3, 6, 9):
                continue
            keeps = [survivors(optimizer, parameter) for parameter in parameters]
            left = torch.cat([left_in_groups(keep, kind.size).flatten() for keep in keeps])
            wanted = math.floor((1 - (1 - step / 9) ** 3) * groups)
            assert sorted(set(left.tolist())) in ([kind.kept], [kind.size], [kind.kept, kind.size])
            assert int((left == kind.kept).sum()) == wanted
            for parameter, keep in zip(parameters, keeps, strict=True):
                assert torch.equal(parameter != 0, keep)
    assert optimizer.pruning.sparsity() == (groups * kind.gone, total)


@pytest.mark.parametrize(("pattern", "layout"), itertools.product(["2:4", "1:3"], ["plain", "channels_last"]))
def test_the_groups_that_lose_least_go_first(pattern, layout):
    """Against a plain loop in float64 over the groups, by |w|, with what stays pruned from one update to the next."""
    parameters = weights(pattern, 6, 3, (3, 3), layout, 0)
    kind = n_of_m(pattern)
    optimizer = pruned_by_hooks(torch.optim.SGD, "magnitude")(
        [{"params": parameters, "prunable": True}], lr=0.1, pattern=pattern, end_step=6, frequency=2
    )
    generator = torch.Generator().manual_seed(1)
    converted = set()
    for step in range(1, 7):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        before = [parameter.detach().double() - 0.1 * parameter.grad.double() for parameter in parameters]
        optimizer.step()
        if step % 2:
            continue
        costs = {}
        for number, weight in enumerate(before):
            split = weight.view(weight.shape[0], -1, kind.size, *weight.shape[2:]).movedim(2, -1)
            for place in itertools.product(*map(range, split.shape[:-1])):
                costs[number, place] = split[place].abs().sort().values[: kind.gone].sum().item()
        wanted = math.floor((1 - (1 - step / 6) ** 3) * len(costs))
        free = sorted((cost, unit) for unit, cost in costs.items() if unit not in converted)
        converted |= {unit for _, unit in free[: wanted - len(converted)]}
        for number, parameter in enumerate(parameters):
            keep = survivors(optimizer, parameter)
            left = left_in_groups(keep, kind.size)
            assert {unit[1] for unit in converted if unit[0] == number} == {
                tuple(place) for place in (left == kind.kept).nonzero().tolist()
            }


def test_within_a_group_the_lowest_go_and_of_equal_ones_the_first():
    parameter = nn.Parameter(torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]]))
    optimizer = pruned_by_hooks(torch.optim.SGD, "magnitude")(
        [{"params": [parameter], "prunable": True}], lr=0.0, pattern="2:4", end_step=1, frequency=1
    )
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert parameter.tolist() == [[4.0, 0.0, 3.0, 0.0], [0.0, 0.0, 1.0, 1.0]]


def test_zeros_of_a_group_are_taken_first_and_cost_nothing():
    scores = torch.tensor([5.0, -torch.inf, 2.0, 1.0, -torch.inf, -torch.inf, 9.0, 9.0, torch.nan, 1.0, 1.0, 1.0])
    costs = group_costs(scores, NOfM(2, 4), 1)
    assert costs[:2].tolist() == [1.0, -torch.inf]
    assert costs[2].isnan()
    assert group_costs(torch.tensor([1.0, 2.0, 3.0, torch.inf]), NOfM(2, 4), 1).item() == torch.inf


@given(
    seed=st.integers(0, 200), pattern=st.sampled_from(["2:4", "1:4", "3:8"]), kernel=st.sampled_from([(1, 1), (3, 3)])
)
@settings(max_examples=25, deadline=None)
def test_regrowth_swaps_within_groups(seed, pattern, kernel):
    """Of a converted group a survivor goes where a pruned weight comes back; its moments begin anew."""
    parameters = weights(pattern, 4, 2, kernel, "plain", seed)
    kind = n_of_m(pattern)
    optimizer = AdamWPrune(
        [{"params": parameters, "prunable": True}], lr=1e-2, pattern=pattern, end_step=9, frequency=3, regrow=0.4
    )
    swapped, before = 0, {}
    for step in steps(optimizer, parameters, seed, 10):
        if step not in (3, 6, 9):
            continue
        for parameter in parameters:
            keep = survivors(optimizer, parameter)
            left = left_in_groups(keep, kind.size)
            assert ((left == kind.kept) | (left == kind.size)).all()
            if parameter in before:
                old = before[parameter]
                back = keep & ~old
                groups = left_in_groups(back, kind.size)
                assert groups.max() <= 1
                assert torch.equal(
                    groups, left_in_groups(old & ~keep, kind.size) * (left_in_groups(old, kind.size) == kind.kept)
                )
                pruned = parameter.grad.abs().masked_fill(old, 0.0)
                best = pruned.view(pruned.shape[0], -1, kind.size, *pruned.shape[2:]).amax(2, keepdim=True)
                best = best.expand(pruned.shape[0], -1, kind.size, *pruned.shape[2:]).reshape(pruned.shape)
                assert torch.equal(pruned[back], best[back])
                swapped += int(back.sum())
            before[parameter] = keep
        assert int(sum((left_in_groups(before[p], kind.size) == kind.kept).sum() for p in parameters)) == math.floor(
            (1 - (1 - step / 9) ** 3) * sum(p.numel() for p in parameters) // kind.size
        )
    assert swapped


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped():
    def run(steps, optimizer, parameters, first=0):
        for step in range(first, steps):
            for number, parameter in enumerate(parameters):
                parameter.grad = torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(9 * step + number)
                )
            optimizer.step()

    def make(values):
        parameters = [nn.Parameter(value.clone()) for value in values]
        groups = [{"params": parameters, "prunable": True}]
        return parameters, AdamWPrune(groups, lr=1e-2, pattern="2:4", end_step=12, frequency=3, regrow=0.2)

    start = [w.detach() for w in weights("2:4", 5, 3, (3, 3), "plain", 3)]
    whole, one = make(start)
    run(15, one, whole)
    for stop in (3, 7, 13):
        first, other = make(start)
        run(stop, other, first)
        second, again = make([w.detach() for w in first])
        again.load_state_dict(other.state_dict())
        run(15, again, second, stop)
        for a, b in zip(whole, second, strict=True):
            assert torch.equal(a, b), stop


def test_the_packed_state_is_that_of_the_survivors():
    parameter = nn.Parameter(torch.randn(64, 64))
    optimizer = AdamWPrune([{"params": [parameter], "prunable": True}], pattern="1:4", end_step=1, frequency=1)
    parameter.grad = torch.randn(64, 64)
    optimizer.step()
    state = optimizer.state[parameter]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (1024,)
    assert optimizer.pruning.sparsity() == (3072, 4096)


def test_layers_that_do_not_fit_stay_dense_and_are_named(caplog):
    model = nn.Sequential()
    model.append(nn.Conv2d(3, 8, 3))
    model.append(nn.Conv2d(8, 8, 3, groups=8))  # depthwise
    model.append(nn.ConvTranspose2d(8, 8, 3))
    model.append(nn.Conv2d(8, 6, 1))
    model.append(nn.Conv2d(6, 8, 1))
    model.append(nn.Linear(8, 4))
    with caplog.at_level("INFO"):
        groups = param_groups(model, pattern="2:4")
    assert [name for group in groups if group["prunable"] for name, _ in group["params"]] == ["3.weight"]
    assert "2:4 leaves dense, stem and classifier: 0.weight, 5.weight" in caplog.text
    assert "2:4 leaves dense, inputs not divisible by 4: 1.weight, 4.weight" in caplog.text
    assert "2:4 leaves dense, inputs are not the second dimension: 2.weight" in caplog.text
    groups = param_groups(model, pattern="2:4", ends=True)
    assert [name for group in groups if group["prunable"] for name, _ in group["params"]] == ["3.weight", "5.weight"]


def test_a_timm_model_says_what_its_ends_are(caplog):
    import timm

    model = timm.create_model("resnet18", num_classes=8)
    with caplog.at_level("INFO"):
        groups = param_groups(model, pattern="2:4")
    names = [name for group in groups if group["prunable"] for name, _ in group["params"]]
    assert len(names) == 19
    assert "stem and classifier: conv1.weight, fc.weight" in caplog.text
    optimizer = AdamWPrune(groups, pattern="2:4", end_step=1, frequency=1)
    assert optimizer.schedule.sparsity == 0.5


def test_without_marks_it_is_what_has_whole_groups():
    fits, odd = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 6))
    for kind in (AdamWPrune, pruned_by_hooks(torch.optim.AdamW, "magnitude")):
        optimizer = kind([fits, odd], lr=1e-3, pattern="2:4", end_step=1, frequency=1)
        fits.grad, odd.grad = torch.randn(4, 8), torch.randn(4, 6)
        optimizer.step()
        assert optimizer.pruning.sparsity() == (16, 32)
        assert "mask" not in optimizer.state[odd]


@pytest.mark.parametrize("kind", [AdamWPrune, pruned_by_hooks(torch.optim.AdamW, "magnitude")])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "4:2", "end_step": 9}, r"pattern='4:2' is not known; choose weight, channel, or N:M"),
        ({"pattern": "2:32", "end_step": 9}, r"M <= 16"),
        ({"pattern": 124, "end_step": 9}, r"pattern=124 is not known.*in YAML '2:4'"),
        ({"pattern": "2:4", "sparsity": 0.7, "end_step": 9}, r"sparsity=0.7 is not that of pattern=2:4"),
        ({"pattern": "2:4"}, "needs end_step"),
        ({"pattern": "channel", "end_step": 9}, "pattern='channel' needs sparsity"),
        ({"pattern": "2:4", "end_step": 9}, r"pattern=2:4 does not fit odd of shape \(4, 6\).*not divisible by 4"),
    ],
)
def test_errors_say_what_to_do(kind, options, message):
    group = {"params": [("odd", nn.Parameter(torch.randn(4, 6)))], "prunable": True}
    with pytest.raises(ValueError, match=message):
        kind([group], lr=1e-3, **options)


def test_sparsity_0_is_the_off_switch():
    parameter = nn.Parameter(torch.randn(4, 8))
    optimizer = AdamWPrune([{"params": [parameter], "prunable": True}], pattern="2:4", sparsity=0.0)
    assert not optimizer.schedule.enabled


def test_flat_slices_are_refused():
    flat = nn.Parameter(torch.randn(4, 8))
    optimizer = AdamWPrune([{"params": [flat], "prunable": True}], pattern="2:4", end_step=1, frequency=1)
    optimizer.pruning.flat_slices = {flat: [Range("a", 0, 32)]}
    flat.grad = torch.randn(4, 8)
    with pytest.raises(ValueError, match="pattern='2:4' needs whole tensors, ZeRO's slices cut them"):
        optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_how_far_apart_neighbours_are(layout):
    part = torch.arange(5 * 4 * 9).view(5, 4, 3, 3).to(memory_format=layout)
    groups = flat_view(part).view(-1, 4, neighbour_distance(part))
    inputs = groups // 9 % 4
    assert (inputs == torch.arange(4).view(1, 4, 1)).all()
    assert ((groups // 36).amin(1) == (groups // 36).amax(1)).all()  # of one output
    assert ((groups % 9).amin(1) == (groups % 9).amax(1)).all()  # at one place of the kernel
