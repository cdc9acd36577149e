"""The native update of packed optimizers against the reference, and what is done where it cannot be built."""

import math

import pytest
import torch
from packed import KINDS, PRUNING, block_offsets, parameters, run, total, zeros
from torch import nn

from toolkit.kernels import compiled, native
from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.sgdprune import SGDPrune
from toolkit.prune.mask import pack_bits

needs_native = pytest.mark.skipif(not compiled.available(), reason="no C++ compiler, so no native code")


@needs_native
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *KINDS,
        (AdamWPrune, {"lr": 1e-2, "amsgrad": True, "maximize": True}),
        (AdamWPrune, {"lr": 1e-2, "decoupled_weight_decay": False, "weight_decay": 0.1}),
        (SGDPrune, {"lr": 1e-2, "nesterov": True, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_native_equals_the_reference_over_a_run(kind, options, layout):
    mine, theirs = parameters(layout=layout), parameters(layout=layout)
    run(kind(mine, **options, **PRUNING, implementation="native"), mine, 30)
    run(kind(theirs, **options, **PRUNING, implementation="reference"), theirs, 30)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a == 0, b == 0)
        assert (a - b).norm() <= 1e-5 * b.norm()


@needs_native
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("numel", [1, 7, 8, 17, 63, 1000, 1024, 1025, 5000, 70_001])
def test_native_equals_the_reference_on_one_tensor(isa, density, numel):
    if native.ISAS.index(isa) > native.ISAS.index(native.best_isa()):
        pytest.skip(f"this processor has no {isa}")
    from toolkit.kernels.reference import adam_update, sgd_update

    generator = torch.Generator().manual_seed(numel)
    keep = torch.rand(numel, generator=generator) < density
    weight, grad = (torch.randn(numel, generator=generator) for _ in range(2))
    moments = [torch.rand(int(keep.sum()), generator=generator) for _ in range(3)]
    mask = pack_bits(keep)
    offsets, _ = block_offsets(mask, numel)
    rule = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, "step": 3}
    mine, wanted = weight.clone(), weight * keep  # pruned places become 0
    mine_moments, survivors = [m.clone() for m in moments], wanted[keep]
    native.packed_adam([native.PackedTensor(mine, grad, mask, offsets, mine_moments)], isa=isa, **rule)
    adam_update(survivors, grad[keep], *moments, **rule)
    wanted[keep] = survivors
    torch.testing.assert_close(mine, wanted, rtol=2e-6, atol=1e-7)
    for a, b in zip(mine_moments, moments, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
    rule = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "nesterov": False, "decoupled": False}
    for first in (True, False):
        mine, wanted, buffer = weight.clone(), weight * keep, moments[0].clone()
        survivors, own = wanted[keep], moments[0].clone()
        native.packed_sgd(
            [native.PackedTensor(mine, grad, mask, offsets, [own])], isa=isa, step=1 if first else 2, **rule
        )
        sgd_update(survivors, grad[keep], buffer, first=first, **rule)
        wanted[keep] = survivors
        torch.testing.assert_close(mine, wanted, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(own, buffer, rtol=2e-6, atol=1e-7)


def test_without_a_compiler_one_warning_and_the_reference(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    compiled.library.cache_clear()
    try:
        with caplog.at_level("WARNING", logger="toolkit"):
            weights = parameters()
            optimizer = AdamWPrune(weights, **PRUNING)
            run(optimizer, weights, 22)
            assert zeros(weights) == math.floor(0.8 * total(weights))
            with pytest.raises(ValueError, match="and a C\\+\\+ compiler"):
                run(AdamWPrune(parameters(), implementation="native"), weights := parameters(), 1) or run(
                    AdamWPrune(weights, implementation="native"), weights, 1
                )
        (said,) = [record.message for record in caplog.records if "no native update" in record.message]
        assert said.startswith("install a C++ compiler and ninja")
        assert len(said) < 220  # torch's reason begins with the whole command
        assert not [record for record in caplog.records if record.name.startswith("torch")]
        assert not list((tmp_path / "adamwprune-toolkit").glob("build-*"))
    finally:
        compiled.library.cache_clear()


@needs_native
def test_a_killed_build_does_not_block_the_next(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    left = tmp_path / "adamwprune-toolkit" / "build-dead"
    left.mkdir(parents=True)
    (left / "lock").touch()  # what torch's extension builder leaves behind when it is killed, and then waits for
    compiled.library.cache_clear()
    try:
        assert compiled.available()
    finally:
        compiled.library.cache_clear()


@needs_native
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_trained_freely_implementations_differ_less_than_two_seeds(kind, options):
    """Loss curves on the digit scans: rounding changes them less than the seed does."""
    from sklearn.datasets import load_digits

    options = options | {"lr": 0.1 if kind is SGDPrune else 0.01}
    scans = load_digits()
    images = torch.from_numpy(scans.images).float().flatten(1) / 16
    labels = torch.from_numpy(scans.target)

    def curve(seed, implementation):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        optimizer = kind(
            model.parameters(), sparsity=0.7, end_step=100, frequency=10, implementation=implementation, **options
        )
        losses = []
        for _ in range(150):
            batch = torch.randint(0, len(images), (64,))
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    reference, other_seed, native = curve(0, "reference"), curve(1, "reference"), curve(0, "native")
    assert native[-20:].mean() < 0.5 * native[:5].mean()
    assert (native - reference).abs().mean() < 0.1 * (other_seed - reference).abs().mean()
