"""Predicted memory against published figures, an independent tracker, and what a run measures between steps."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from toolkit.builder.model import create_model
from toolkit.builder.optimizer import create_optimizer
from toolkit.builder.predict import Prediction, parse_bytes, predict, predict_run
from toolkit.config import Config
from toolkit.memory.ledger import count_bytes, find_owners
from toolkit.prune.schedule import Schedule

MIB = 2**20


def predicted(model="test_resnet", opt="adamw", ranks=1, engine="ddp", **settings):
    return Prediction(Config(model=model, opt=opt, **settings), num_ranks=ranks, engine=engine)


# Counted beforehand with torch's MemTracker over two whole steps of AdamW, in MiB.
@pytest.mark.parametrize(
    ("amp", "batch_size", "expected"),
    [
        (None, 128, 10_884.7),
        pytest.param("bf16", 128, 5_808.8, marks=pytest.mark.long),
        pytest.param(None, 64, 5_592.7, marks=pytest.mark.long),
        ("bf16", 256, 11_272.3),
    ],
)
def test_resnet50_with_adamw(amp, batch_size, expected):
    result = predict(Config(model="resnet50", opt="adamw", amp=amp, batch_size=batch_size))
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


@pytest.mark.long
@pytest.mark.parametrize("model", ["resnet50", "vit_small_patch16_224", "convnext_tiny"])
def test_agrees_with_an_independent_count(model):
    assert predicted(model).peaks(16)["dense"] == pytest.approx(counted_by_mem_tracker(model, 16, 224), rel=0.0025)


def test_pruning_rows_are_to_the_byte():
    prediction = predicted("resnet50", "adamwprune", sparsity=0.7, state_dtype="float32")
    dense, final = (prediction.ledger(8, sparsity) for sparsity in (None, 0.7))
    prunable, every = 25_502_912, 25_557_032
    survivors = prunable - int(0.7 * prunable)
    assert dense["optim.exp_avg"] == 4 * every
    assert final["optim.exp_avg"] == final["optim.exp_avg_sq"] == 4 * (survivors + every - prunable)
    assert final["masks"] == prunable // 8
    assert "masks" not in dense
    assert dense["weights"] == final["weights"] == 4 * every
    movement = predicted("resnet50", "adamw-movement", sparsity=0.7)
    assert movement.ledger(8, None)["scores"] == 4 * prunable  # from the first step on
    assert "optim.exp_avg" not in predicted("test_resnet", "sgd").ledger(8, None)


def test_ranks_engines_and_averages():
    alone = predicted().ledger(8, None)
    ranks = predicted(ranks=4, model_ema=True).ledger(8, None)
    assert ranks["ddp_buckets"] == ranks["weights"]
    assert "gradients" not in ranks  # views of the buckets
    assert ranks["ema"] == alone["weights"] + alone["buffers"]
    zero = predicted(ranks=4, engine="zero1").ledger(8, None)
    assert zero["optim.exp_avg"] == -(-alone["optim.exp_avg"] // 4)
    fsdp = predicted(ranks=4, engine="fsdp2").ledger(8, None)
    assert fsdp["weights"] == -(-alone["weights"] // 4)


def test_checkpointing_takes_less_and_the_largest_batch_fits():
    plain = predicted("resnet50", amp="bf16")
    less = predicted("resnet50", amp="bf16", grad_checkpointing=True)
    assert less.peaks(128)["dense"] < 0.5 * plain.peaks(128)["dense"]
    limit = 48 * 2**30
    largest = plain.largest_batch(limit)
    assert plain.needed_bytes(largest) <= limit < plain.needed_bytes(largest + 1)
    assert plain.largest_batch(2**20) == 0


def test_sizes():
    assert parse_bytes("48GiB") == 48 * 2**30
    assert parse_bytes("1.5 gb") == 1_500_000_000
    assert parse_bytes("1024") == 1024


def test_the_models_arguments_count():
    whole = predicted("resnet10t", img_size=32, num_classes=10)
    narrow = predicted("resnet10t", img_size=32, num_classes=10, model_kwargs={"channels": [16, 32, 64, 128]})
    assert narrow.ledger(4, None)["weights"] < whole.ledger(4, None)["weights"] / 10


def freeze_stem(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(("conv1", "bn1", "layer1"))
    return model


@pytest.mark.parametrize("opt", ["adamwprune", "momentum-movement", "adamw"])
def test_rows_between_steps_are_those_measured_also_of_frozen_weights_under_ddp(opt, one_rank_group, monkeypatch):
    """Of frozen weights there is no bucket, moment or mask; the run's report and the prediction have one arithmetic."""
    config = Config(model="test_resnet", opt=opt, sparsity=None if opt == "adamw" else 0.7, num_classes=10, img_size=32)
    pruning = {} if opt == "adamw" else {"sparsity": 0.7, "begin_step": 1, "end_step": 3, "frequency": 1}
    model = freeze_stem(create_model(config, 10)).train()
    optimizer = create_optimizer(config, model, opt, 1e-3, Schedule(**pruning))
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
    measured = count_bytes(find_owners(model, optimizer.state, in_buckets=True))
    engine = SimpleNamespace(name="ddp", module=model, optimizer_state=optimizer.state)
    monkeypatch.setattr("toolkit.builder.predict.create_model", lambda *asked: freeze_stem(create_model(*asked)))
    rows, peaks = predict_run(config, engine, 10, num_ranks=2)
    assert {row: size for row, size in rows.items() if size} == {row: size for row, size in measured.items() if size}
    step = {"input", "activations", "workspace"}
    final = {row: size for row, size in peaks["final"].items() if row not in step}
    assert final == {row: size for row, size in measured.items() if size}
    assert measured["ddp_buckets"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_nothing_is_predicted_of_an_engine_that_offloads(caplog):
    engine = SimpleNamespace(name="zero2", offloads=True)
    assert predict_run(Config(), engine, 10, num_ranks=2) == ({}, {})
    assert caplog.messages == ["the memory ledger is not predicted: zero2 keeps a part on the host"]


def test_a_scaler_holds_the_scaled_loss_by_whatever_name_float16_is_asked_for():
    asked = [predicted(amp=name).ledger(4, None) for name in ("bf16", "fp16", "float16", "default")]
    assert [rows["workspace"] - asked[0]["workspace"] for rows in asked] == [0, 4, 4, 4]
