"""The same masks whatever the sharding: plain tensors, FSDP2's shards and flat slices, on 1, 2 and 3 ranks."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.sgdprune import SGDPrune
from toolkit.prune.channels import ChannelGroup, ChannelSlice
from toolkit.prune.hooks import pruned_by_hooks
from toolkit.prune.select import choose_lowest


def rows(name, axis, count):
    return ChannelSlice(name, axis, torch.arange(count).unsqueeze(1))


SHAPES = ((7, 5, 3, 3), (12, 10), (2, 40))  # 7 rows over 2 or 3 ranks are uneven; 2 over 3 leave one rank without any
# Coded in 8 bits, cut between groups of 256 weights over 2 and 3 ranks; the last is too small for codes.
CODED_SHAPES = ((96, 64), (48, 16, 4, 4), (12, 10))
# Cut within groups, once at multiples of 32 weights and once not.
UNEVEN_SHAPES = ((64, 16, 3, 3), (50, 96), (12, 10))
ODD_SHAPES = ((64, 16, 3, 3), (50, 99), (12, 10))
# Whole groups of 4 inputs; the rows of the first two are read by the columns of the next.
PATTERN_SHAPES = ((7, 8, 3, 3), (16, 8), (12, 16), (2, 12))
CHANNELS = tuple(
    ChannelGroup(str(one), count, (rows(str(one), 0, count), rows(str(other), 1, count)))
    for one, other, count in ((1, 2, 16), (2, 3, 12))
)


def weights_and_gradients(steps, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    # Rounded, so that there are ties to break.
    weights = [torch.randn(shape, generator=generator).round(decimals=1) for shape in shapes]
    return weights, [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps)]


def make(parameters, kind, options):
    named = [(str(number), parameter) for number, parameter in enumerate(parameters)]
    channels = {"channels": list(CHANNELS)} if options.get("pattern") == "channel" else {}
    schedule = {"sparsity": 0.8, "begin_step": 0, "end_step": 12, "frequency": 3}
    return kind([{"params": named, "prunable": True, **channels}], lr=1e-2, **{**schedule, **options})


def train(parameters, gradients, kind, options, group=None):
    optimizer = make(parameters, kind, options)
    optimizer.pruning.shard_group = group
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return optimizer


def alone(kind, options, shapes=SHAPES):
    weights, gradients = weights_and_gradients(14, shapes)
    parameters = [nn.Parameter(weight) for weight in weights]
    optimizer = train(parameters, gradients, kind, options)
    return [p.detach() for p in parameters], optimizer


def _fsdp2(rank, kind, options, shapes=SHAPES):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    weights, gradients = weights_and_gradients(14, shapes)
    model = nn.ParameterList([nn.Parameter(weight) for weight in weights])
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    parameters = list(model.parameters())
    assert all(hasattr(p, "to_local") for p in parameters)
    sharded = [
        [distribute_tensor(g, p.device_mesh, p.placements) for g, p in zip(step, parameters, strict=True)]
        for step in gradients
    ]
    optimizer = train(parameters, sharded, kind, options)
    saved = optimizer.state_dict()
    whole = [
        {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}
        for state in saved["state"].values()
    ]
    again = make(parameters, kind, options)
    again.load_state_dict(copy.deepcopy(saved))
    same = all(
        torch.equal(again.state[p][key], optimizer.state[p][key]) for p in parameters for key in optimizer.state[p]
    )
    return [p.full_tensor().detach() for p in parameters], whole, same


def _flat_slices(rank, kind, options):
    weights, gradients = weights_and_gradients(14)
    cuts = [len(torch.cat([w.flatten() for w in weights])) * i // dist.get_world_size() for i in (rank, rank + 1)]
    part = slice(*cuts)
    parameter = nn.Parameter(torch.cat([w.flatten() for w in weights])[part].clone())
    flat = [[torch.cat([g.flatten() for g in step])[part].clone()] for step in gradients]
    train([parameter], flat, kind, options, dist.group.WORLD)
    return parameter.detach()


CASES = [
    (AdamWPrune, {}),
    (AdamWPrune, {"score": "magnitude", "regrow": 0.2}),
    (AdamWPrune, {"scope": "layer", "regrow": 0.2}),
    (AdamWPrune, {"scope": "erk"}),
    (SGDPrune, {}),
]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_fsdp2_prunes_as_one_rank_does(num_ranks, kind, options):
    wanted, optimizer = alone(kind, options)
    for weights, (first_state, *_), reloads in run_ranks(_fsdp2, num_ranks, kind, options):
        for mine, theirs in zip(weights, wanted, strict=True):
            assert torch.equal(mine == 0, theirs == 0)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
        assert reloads
        dense = optimizer.state_dict()["state"][0]
        assert dense.keys() == first_state.keys()
        for key, value in first_state.items():
            torch.testing.assert_close(value, dense[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_ranks", [pytest.param(2, marks=pytest.mark.long), 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AdamWPrune, {"pattern": "2:4", "sparsity": None}),
        (SGDPrune, {"pattern": "1:4", "sparsity": None, "regrow": 0.3, "scope": "layer"}),
        (pruned_by_hooks(torch.optim.AdamW, "movement"), {"pattern": "3:4", "sparsity": None}),
        (AdamWPrune, {"pattern": "channel", "sparsity": 0.4}),
        (SGDPrune, {"pattern": "channel", "sparsity": 0.4, "score": "magnitude"}),
        (AdamWPrune, {"pattern": "channel", "sparsity": 0.4, "scope": "layer"}),
        (pruned_by_hooks(torch.optim.AdamW, "magnitude"), {"pattern": "channel", "sparsity": 0.4}),
        (pruned_by_hooks(torch.optim.AdamW, "movement"), {"pattern": "channel", "sparsity": 0.4}),
        (
            pruned_by_hooks(torch.optim.SGD, "movement"),
            {"pattern": "channel", "sparsity": 0.4, "scope": "layer", "channel_multiple": 3},
        ),
    ],
    ids=str,
)
def test_patterns_are_those_of_one_rank(num_ranks, kind, options):
    wanted, optimizer = alone(kind, options, PATTERN_SHAPES)
    zeros, weights = optimizer.pruning.sparsity()
    assert 0 < zeros < weights
    for weights, _, reloads in run_ranks(_fsdp2, num_ranks, kind, options, PATTERN_SHAPES):
        assert reloads
        for mine, theirs in zip(weights, wanted, strict=True):
            assert torch.equal(mine == 0, theirs == 0)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("kind", [AdamWPrune, SGDPrune])
@pytest.mark.parametrize("implementation", ["reference", "auto"])
def test_fsdp2_keeps_the_codes_of_one_rank(num_ranks, kind, implementation):
    options = {"implementation": implementation, "state_dtype": "int8"}
    wanted, optimizer = alone(kind, options, CODED_SHAPES)
    dense = optimizer.state_dict()["state"].values()
    for weights, states, reloads in run_ranks(_fsdp2, num_ranks, kind, options, CODED_SHAPES):
        assert reloads
        for mine, theirs in zip(weights, wanted, strict=True):
            assert torch.equal(mine == 0, theirs == 0)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
        for mine, theirs in zip(states, dense, strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("kind", [AdamWPrune, SGDPrune])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(
    ("precision", "shapes", "least"),
    [
        ("int8", UNEVEN_SHAPES, 0.999),
        ("auto", CODED_SHAPES, 0.999),
        ("bfloat16", UNEVEN_SHAPES, 0.999),
        ("int8", ODD_SHAPES, 0.997),
    ],
)
def test_where_a_group_is_cut_masks_differ_by_little(kind, num_ranks, precision, shapes, least):
    """The group that is cut is coded apart; where it is not at a multiple of 32 weights, all of that rank's part.

    bfloat16 is rounded by chances of the rank's own.
    """
    options = {"state_budget" if precision == "auto" else "state_dtype": precision}
    wanted, _ = alone(kind, options, shapes)
    for weights, _, reloads in run_ranks(_fsdp2, num_ranks, kind, options, shapes):
        assert reloads
        agree = sum(int(((mine == 0) == (theirs == 0)).sum()) for mine, theirs in zip(weights, wanted, strict=True))
        assert agree >= least * sum(weight.numel() for weight in wanted)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize(("kind", "options"), [case for case in CASES if "scope" not in case[1]])
def test_flat_slices_prune_as_one_rank_does(num_ranks, kind, options):
    # One source instead of three: the guard against emptied layers, which slices cannot know, does not act here.
    wanted = torch.cat([weight.flatten() for weight in alone(kind, options)[0]])
    found = torch.cat(run_ranks(_flat_slices, num_ranks, kind, options))
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def _select(rank, scores, k):
    size = dist.get_world_size()
    mine = [torch.tensor_split(s, size)[rank] for s in scores]
    sources = [lambda s=s: s.split(3) if len(s) else [] for s in mine]
    names = [str(i) for i in range(len(scores))]
    return [list(choose_lowest(sources, names, [len(s) for s in mine], count, dist.group.WORLD)) for count in k]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ties_go_in_the_same_order_on_any_number_of_ranks(num_ranks):
    generator = torch.Generator().manual_seed(1)
    scores = [torch.randint(-2, 3, (n,), generator=generator).float() for n in (1, 2, 7, 30)]
    k = range(41)
    sources = [lambda s=s: s.split(4) for s in scores]
    results = run_ranks(_select, num_ranks, scores, k)
    for count in k:
        wanted = list(choose_lowest(sources, ["a", "b", "c", "d"], [len(s) for s in scores], count))
        for position, whole in enumerate(wanted):
            assert torch.equal(torch.cat([result[count][position] for result in results]), whole), (count, position)


def _nan(rank):
    mine = torch.tensor([1.0, float("nan") if rank else 2.0])
    with pytest.raises(ValueError, match=r"conv2\.weight is NaN"):
        list(
            choose_lowest(
                [lambda: [mine[:1]], lambda: [mine]], ["conv1.weight", "conv2.weight"], [1, 2], 1, dist.group.WORLD
            )
        )
    return True


def test_a_nan_on_one_rank_is_an_error_on_all():
    assert run_ranks(_nan, 2) == [True, True]
