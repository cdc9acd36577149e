"""Predicted memory against published figures, an independent tracker, and what a real step takes."""

import json

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from toolkit.memory.activations import StorageTracker, track_step
from toolkit.memory.predict import Prediction, Question, main, parse_bytes, predict

MIB = 2**20


def quiet(text):
    pass


# Counted beforehand with torch's MemTracker over two whole steps of AdamW, in MiB.
@pytest.mark.parametrize(
    ("amp", "batch_size", "expected"),
    [
        (None, 128, 10_884.7),
        ("bf16", 128, 5_808.8),
        (None, 64, 5_592.7),
        ("bf16", 256, 11_272.3),
    ],
)
def test_resnet50_with_adamw(amp, batch_size, expected):
    result = predict(Question("resnet50", amp=amp), batch_size)
    assert result["peak_allocated_bytes"]["dense"] / MIB == pytest.approx(expected, rel=0.01)
    assert sum(result["ledger"]["dense"].values()) == result["peak_allocated_bytes"]["dense"]


def counted_by_mem_tracker(model_name, batch_size, size):
    """Peak bytes of the second step with AdamW, by torch's own tracker."""
    made = timm.create_model(model_name).train()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for module in made.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(fake.from_tensor(parameter.detach()))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = fake.from_tensor(buffer)
        images, labels = torch.empty(batch_size, 3, size, size), torch.zeros(batch_size, dtype=torch.int64)
        optimizer = torch.optim.AdamW(made.parameters(), foreach=False)
        tracker = MemTracker()
        tracker.track_external(made, optimizer, images, labels)
        with tracker:
            for step in range(2):
                optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(made(images), labels).backward()
                optimizer.step()
                if step == 0:
                    tracker.reset_mod_stats()
        (found,) = tracker.get_tracker_snapshot("peak").values()
    return found["Total"]


@pytest.mark.parametrize("model", ["resnet50", "vit_small_patch16_224", "convnext_tiny"])
def test_agrees_with_an_independent_count(model):
    predicted = Prediction(Question(model), quiet).peaks(16)["dense"]
    assert predicted == pytest.approx(counted_by_mem_tracker(model, 16, 224), rel=0.0025)


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "resnet10t"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_real_step_takes_what_was_predicted(model, amp):
    size = 160 if model == "test_vit" else 64
    options = {"img_size": size} if model == "test_vit" else {}
    expected = track_step(lambda: timm.create_model(model, **options), (3, size, size), 1000, amp_dtype=amp)
    real = timm.create_model(model, **options).train()
    tracker = StorageTracker()
    tracker.forget(tensor for tensor in (*real.parameters(), *real.buffers()))
    with tracker:
        images, labels = torch.zeros(11, 3, size, size), torch.zeros(11, dtype=torch.int64)
        with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
            loss = nn.functional.cross_entropy(real(images), labels)
        loss.backward()
    change = [0] * (tracker.events + 1)
    for one in tracker.lifetimes:
        change[one.born] += one.size_bytes
        change[tracker.events if one.died is None else one.died] -= one.size_bytes
    total = highest = 0
    for difference in change:
        total += difference
        highest = max(highest, total)
    # Under autocast fake batch norms keep their statistics in bfloat16, real ones in float32: some kB.
    assert sum(expected.peak(11).values()) == (highest if amp is None else pytest.approx(highest, rel=1e-3))


def test_pruning_rows_are_to_the_byte():
    dense, final = (
        Prediction(Question("resnet50", "adamwprune", sparsity=0.7), quiet).ledger(8, sparsity)
        for sparsity in (None, 0.7)
    )
    prunable, every = 25_502_912, 25_557_032
    survivors = prunable - int(0.7 * prunable)
    assert dense["optim.exp_avg"] == 4 * every
    assert final["optim.exp_avg"] == final["optim.exp_avg_sq"] == 4 * (survivors + every - prunable)
    assert final["masks"] == prunable // 8
    assert "masks" not in dense
    assert dense["weights"] == final["weights"] == 4 * every
    movement = Prediction(Question("resnet50", "adamw-movement", sparsity=0.7), quiet)
    assert movement.ledger(8, None)["scores"] == 4 * prunable  # from the first step on
    assert "optim.exp_avg" not in Prediction(Question("test_resnet", "sgd"), quiet).ledger(8, None)


def test_ranks_engines_and_averages():
    alone = Prediction(Question("test_resnet"), quiet).ledger(8, None)
    ranks = Prediction(Question("test_resnet", ranks=4, ema=True), quiet).ledger(8, None)
    assert ranks["ddp_buckets"] == ranks["weights"]
    assert "gradients" not in ranks  # views of the buckets
    assert ranks["ema"] == alone["weights"] + alone["buffers"]
    zero = Prediction(Question("test_resnet", ranks=4, zero=1), quiet).ledger(8, None)
    assert zero["optim.exp_avg"] == -(-alone["optim.exp_avg"] // 4)
    fsdp = Prediction(Question("test_resnet", ranks=4, fsdp=True), quiet).ledger(8, None)
    assert fsdp["weights"] == -(-alone["weights"] // 4)


def test_checkpointing_takes_less_and_the_largest_batch_fits():
    plain = Prediction(Question("resnet50", amp="bf16"), quiet)
    less = Prediction(Question("resnet50", amp="bf16", grad_checkpointing=True), quiet)
    assert less.peaks(128)["dense"] < 0.5 * plain.peaks(128)["dense"]
    limit = 48 * 2**30
    largest = plain.largest_batch(limit)
    assert plain.needed_bytes(largest) <= limit < plain.needed_bytes(largest + 1)
    assert plain.largest_batch(2**20) == 0


def test_the_command(capsys):
    flags = ["--model", "test_resnet", "-b", "16", "--opt", "adamwprune", "--sparsity", "0.7", "--fits", "48GiB"]
    assert main([*flags, "--max-batch-size", "2GiB", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["peak_allocated_bytes"].keys() == {"dense", "final"}
    assert result["fits"]["fits"] is True
    assert result["max_batch_size"]["batch_size"] > 16
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "48 GiB: it fits." in said
    assert "peak allocated" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "resnet5000"], "is not a timm model"),
        (["--opt", "lamb"], "python -m toolkit.optim --list"),
        (["--fits", "many"], "write it like 48GiB"),
        (["--sparsity", "1"], "must be in"),
        (["-b", "0"], "at least 1"),
    ],
)
def test_mistakes_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said


def test_sizes():
    assert parse_bytes("48GiB") == 48 * 2**30
    assert parse_bytes("1.5 gb") == 1_500_000_000
    assert parse_bytes("1024") == 1024


def test_the_models_arguments_count():
    whole = Prediction(Question("resnet10t", img_size=32, num_classes=10), lambda text: None)
    narrow = Prediction(
        Question("resnet10t", img_size=32, num_classes=10, model_options={"channels": [16, 32, 64, 128]}),
        lambda text: None,
    )
    assert narrow.ledger(4, None)["weights"] < whole.ledger(4, None)["weights"] / 10
