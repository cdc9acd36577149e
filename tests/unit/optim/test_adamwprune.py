import copy
import pickle

import pytest
import torch
from torch import nn

from toolkit.optim.adamwprune import AdamWPrune
from toolkit.prune.mask import flat_view, unpack_bits
from toolkit.prune.packing import offset_bytes
from toolkit.prune.schedule import Schedule

SHAPES = ((17, 5, 3, 3), (17,), (40, 33), (40,))


def make_parameters(seed=0, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [nn.Parameter(t.to(memory_format=layout) if t.ndim == 4 else t) for t in made]


def set_gradients(parameters, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(parameter.detach().abs().mean())


def run(optimizer, parameters, steps, first=0):
    for step in range(first, first + steps):
        set_gradients(parameters, step)
        optimizer.step()


def prunable(parameters):
    return [p for p in parameters if p.ndim > 1]


def zeros(parameters):
    return sum(int((p == 0).sum()) for p in prunable(parameters))


def count(parameters):
    return sum(p.numel() for p in prunable(parameters))


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, torch.optim.AdamW),
        ({"amsgrad": True}, torch.optim.AdamW),
        ({"maximize": True, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}, torch.optim.AdamW),
        ({"decoupled_weight_decay": False, "weight_decay": 0.1}, torch.optim.Adam),
        ({"weight_decay": 0.0, "lr": torch.tensor(3e-3)}, torch.optim.AdamW),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_sparsity_0_is_torchs_optimizer_bit_for_bit(options, plain, layout):
    mine, theirs = make_parameters(layout=layout), make_parameters(layout=layout)
    optimizer = AdamWPrune(mine, **options, implementation="reference")
    plain_options = {key: value for key, value in options.items() if key != "decoupled_weight_decay"}
    reference = plain(theirs, foreach=False, **plain_options)
    run(optimizer, mine, 50)
    run(reference, theirs, 50)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
        assert set(optimizer.state[a]) == set(reference.state[b])
        assert all(torch.equal(optimizer.state[a][key], reference.state[b][key]) for key in reference.state[b])


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"decoupled_weight_decay": False}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("score", ["magnitude", "variance", "obd"])
def test_packed_equals_dense_adamw_with_a_mask(options, layout, score):
    """The same masks from a dense AdamW whose weights are masked after each step, scored in the open."""
    mine, theirs = make_parameters(layout=layout), make_parameters(layout=layout)
    schedule = Schedule(0.75, 4, 30, 6)
    pruning = {"sparsity": 0.75, "begin_step": 4, "end_step": 30, "frequency": 6, "score": score}
    optimizer = AdamWPrune(mine, lr=1e-2, **pruning, **options, implementation="reference")
    plain = torch.optim.Adam if options.get("decoupled_weight_decay") is False else torch.optim.AdamW
    reference = plain(theirs, lr=1e-2, weight_decay=1e-2, foreach=False, amsgrad=options.get("amsgrad", False))
    masks = [torch.ones_like(p, dtype=torch.bool) for p in prunable(theirs)]
    power = {"magnitude": 0.0, "variance": 0.25, "obd": 0.5}[score]
    for step in range(1, 41):
        run(optimizer, mine, 1, first=step)
        run(reference, theirs, 1, first=step)
        with torch.no_grad():
            if schedule.is_update_step(step) and (wanted := schedule.num_zeros_at(step, count(theirs))):
                scores = []
                for p, mask in zip(prunable(theirs), masks, strict=True):
                    value = p.abs() * reference.state[p]["exp_avg_sq"].pow(power)
                    scores.append(
                        flat_view(
                            value.masked_fill(~mask, -1.0).contiguous(memory_format=layout)
                            if p.ndim == 4
                            else value.masked_fill(~mask, -1.0)
                        )
                    )
                limit = torch.cat(scores).sort().values[wanted - 1]
                for mask, value in zip(masks, scores, strict=True):
                    flat_view(mask).copy_(value > limit)
            for p, mask in zip(prunable(theirs), masks, strict=True):
                p.mul_(mask)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b), step
    assert zeros(mine) == int(0.75 * count(mine))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.997])
def test_reaches_exactly_floor_of_the_target_and_stays(sparsity):
    parameters = make_parameters()
    optimizer = AdamWPrune(parameters, lr=1e-2, sparsity=sparsity, begin_step=0, end_step=17, frequency=5)
    run(optimizer, parameters, 17)
    wanted = int(sparsity * count(parameters))
    assert zeros(parameters) == wanted
    run(optimizer, parameters, 20, first=17)
    assert zeros(parameters) == wanted


def test_state_is_packed_and_dense_moments_are_freed():
    parameters = make_parameters()
    optimizer = AdamWPrune(parameters, sparsity=0.7, end_step=5, frequency=1)
    run(optimizer, parameters, 8)
    for p in prunable(parameters):
        survivors = int((p != 0).sum())
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "mask", "offsets"}
        for key in ("exp_avg", "exp_avg_sq"):
            assert state[key].shape == (survivors,)
            assert state[key].untyped_storage().nbytes() == 4 * survivors
        assert state["mask"].untyped_storage().nbytes() == -(-p.numel() // 8)
        assert state["offsets"].untyped_storage().nbytes() == offset_bytes(p.numel())
    for p in parameters:
        if p.ndim == 1:
            assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


def test_bytes_a_weight_at_70_percent():
    weight = nn.Parameter(torch.randn(1024, 512))
    optimizer = AdamWPrune([weight], sparsity=0.7, end_step=2, frequency=1)
    run(optimizer, [weight], 3)
    kept = sum(value.untyped_storage().nbytes() for value in optimizer.state[weight].values())
    assert kept / weight.numel() <= 2.54


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cut", [3, 11, 25])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_reload_then_step_equals_not_reloading(layout, cut, amsgrad):
    options = {"lr": 1e-2, "sparsity": 0.8, "begin_step": 4, "end_step": 20, "frequency": 3, "amsgrad": amsgrad}
    straight = make_parameters(layout=layout)
    run(AdamWPrune(straight, **options), straight, 30)
    parts = make_parameters(layout=layout)
    optimizer = AdamWPrune(parts, **options)
    run(optimizer, parts, cut)
    saved = copy.deepcopy(optimizer.state_dict())
    again = AdamWPrune(parts, **options)
    again.load_state_dict(saved)
    for p in parts:
        assert set(again.state[p]) == set(optimizer.state[p])
        for key, value in optimizer.state[p].items():
            loaded = again.state[p][key]
            assert (loaded.dtype, loaded.nbytes) == (value.dtype, value.nbytes)
            assert torch.equal(loaded, value)
    run(again, parts, 30 - cut, first=cut)
    assert all(torch.equal(a, b) for a, b in zip(parts, straight, strict=True))


def test_state_dict_is_dense_and_loads_into_plain_adamw():
    parameters = make_parameters(layout=torch.channels_last)
    optimizer = AdamWPrune(parameters, sparsity=0.7, end_step=5, frequency=1)
    run(optimizer, parameters, 8)
    saved = optimizer.state_dict()
    for p, state in zip(parameters, saved["state"].values(), strict=True):
        assert all(value.shape == p.shape for key, value in state.items() if key != "step")
        assert "offsets" not in state
        if p.ndim > 1:
            assert torch.equal(state["mask"], p != 0)
            assert not state["exp_avg"][p == 0].any()
    plain = torch.optim.AdamW(parameters)
    plain.load_state_dict(saved)
    run(plain, parameters, 2, first=8)


def test_loads_from_plain_adamw_and_prunes_on():
    parameters = make_parameters()
    plain = torch.optim.AdamW(parameters)
    run(plain, parameters, 5)
    optimizer = AdamWPrune(parameters, sparsity=0.6, end_step=10, frequency=5)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["sparsity"] == 0.6
    run(optimizer, parameters, 6, first=5)
    assert zeros(parameters) == int(0.6 * count(parameters))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(how):
    parameters = make_parameters()
    optimizer = AdamWPrune(parameters, lr=1e-2, sparsity=0.6, end_step=20, frequency=4)
    run(optimizer, parameters, 9)
    other = how(optimizer)
    twins = [p for group in other.param_groups for p in group["params"]]
    run(optimizer, parameters, 15, first=9)
    run(other, twins, 15, first=9)
    assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))
    assert zeros(twins) == int(0.6 * count(twins))


def test_groups_marked_prunable_decide():
    convolution, embedding, linear = (nn.Parameter(torch.randn(8, 9)) for _ in range(3))
    optimizer = AdamWPrune(
        [{"params": [convolution, linear], "prunable": True}, {"params": [embedding], "prunable": False}],
        sparsity=0.5,
        end_step=2,
        frequency=1,
    )
    run(optimizer, [convolution, embedding, linear], 3)
    assert int((convolution == 0).sum() + (linear == 0).sum()) == 72
    assert not (embedding == 0).any()


def test_unmarked_leaves_out_norms_tokens_and_position_embeddings():
    weight, norm, token, position = (nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (6,), (1, 1, 6), (1, 9, 6)))
    optimizer = AdamWPrune([weight, norm, token, position], sparsity=0.5, end_step=2, frequency=1)
    run(optimizer, [weight, norm, token, position], 3)
    assert int((weight == 0).sum()) == 18
    assert all((p != 0).all() for p in (norm, token, position))


def test_closure_and_add_param_group():
    first, second = nn.Parameter(torch.randn(10, 10)), nn.Parameter(torch.randn(10, 10))
    optimizer = AdamWPrune([first], sparsity=0.5, end_step=4, frequency=1)
    optimizer.add_param_group({"params": [second]})

    def closure():
        optimizer.zero_grad()
        loss = first.square().sum() + second.square().sum()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert int((first == 0).sum() + (second == 0).sum()) == 100


def test_parameters_that_miss_gradients():
    parameters = make_parameters()
    optimizer = AdamWPrune(parameters, sparsity=0.5, end_step=6, frequency=2)
    for step in range(8):
        set_gradients(parameters, step)
        if step in (2, 3):
            parameters[2].grad = None  # now and then: its own counter stands still
        optimizer.step()
    assert zeros(parameters) == int(0.5 * count(parameters))
    idle = nn.Parameter(torch.randn(3, 3))
    optimizer = AdamWPrune([("busy", parameters[0]), ("idle", idle)], sparsity=0.5, end_step=2, frequency=1)
    with pytest.raises(ValueError, match="idle is prunable but had no gradient"):
        run(optimizer, [parameters[0]], 3)


def test_empty_parameter_is_no_obstacle():
    weight, empty = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(2, 0))
    optimizer = AdamWPrune([weight, empty], sparsity=0.5, end_step=2, frequency=1)
    run(optimizer, [weight], 0)
    for step in range(4):
        weight.grad, empty.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step)), torch.zeros(2, 0)
        optimizer.step()
    assert int((weight == 0).sum()) == 32
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_gradient_in_another_layout():
    parameter = nn.Parameter(torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last))
    twin = nn.Parameter(parameter.detach().clone())
    options = {"sparsity": 0.5, "end_step": 3, "frequency": 1}
    one, two = AdamWPrune([parameter], **options), AdamWPrune([twin], **options)
    for step in range(6):
        grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
        parameter.grad, twin.grad = grad.contiguous(), grad.to(memory_format=torch.channels_last)
        one.step()
        two.step()
    assert torch.equal(parameter, twin)


def test_mask_is_the_weights_zeros():
    parameters = make_parameters(layout=torch.channels_last)
    optimizer = AdamWPrune(parameters, sparsity=0.7, end_step=5, frequency=1)
    run(optimizer, parameters, 9)
    for p in prunable(parameters):
        assert torch.equal(unpack_bits(optimizer.state[p]["mask"], p.numel()), flat_view(p) != 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.5}, "needs end_step"),
        ({"sparsity": 0.5, "end_step": 3, "score": "fisher"}, "variance, magnitude, obd"),
        ({"scope": "planet"}, "choose one of global, layer, erk"),
        ({"implementation": "fpga"}, "auto, reference, native"),
        ({"regrow": 1.0}, "regrow=1.0"),
        ({"state_dtype": "int4"}, "float32, bfloat16"),
        ({"lr": -1.0}, "lr=-1.0 must be"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
    ],
)
def test_refuses_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        AdamWPrune(make_parameters(), **options)


def test_refuses_sparse_and_complex_gradients():
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="SparseAdam"):
        AdamWPrune(embedding.parameters()).step()
    number = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    number.grad = torch.ones_like(number)
    with pytest.raises(ValueError, match="dense real gradients"):
        AdamWPrune([number]).step()


def test_grad_scaler_skips_count_no_step():
    parameters = make_parameters()
    optimizer = AdamWPrune(parameters, sparsity=0.5, end_step=4, frequency=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(6):
        set_gradients(parameters, step)
        for p in parameters:
            p.grad.mul_(2.0)
        if step == 1:
            parameters[0].grad[0] = float("inf")
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update(2.0)
    assert int(optimizer.state[parameters[0]]["step"]) == 5
    assert zeros(parameters) == int(0.5 * count(parameters))
