"""Clipping, averages, fp16 and compiled models: on FSDP2 and ZeRO-1, 2, 3 as on DDP."""

import functools
import importlib.metadata
import os
import signal
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from engines import ENGINES, whole_states, whole_weights
from flags import train_flags, vit_flags
from packaging.version import Version
from ranks import run_ranks
from safetensors.torch import save_file
from test_engines import SETTINGS, far

pytest.importorskip("deepspeed")

import toolkit.builder.accelerator
from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.loop import train as train_loop
from toolkit.errors import InterruptedRunError

LAYER = "blocks.0.attn.qkv.weight"
SHARDED = [engine for engine in ENGINES if engine != "ddp"]
PRUNED = ("--opt", "adamwprune", "--sparsity", "0.7", "--state-dtype", "float32")
SHORT = ("--epochs", "2", "--val-interval", "2")
# Half precision makes another thousandth of a weight's last bit: an update that is the same bit for bit everywhere.
EXACT = ("--opt", "momentum", "--pruning", "movement", "--lr", "3e-2")
FEATURES = {
    "norm": ("--clip-grad", "1"),  # over all 56 steps, in which rounding grows
    "value": ("--clip-grad", "0.01", "--clip-mode", "value", *SHORT),
    "agc": ("--clip-grad", "0.01", "--clip-mode", "agc", *SHORT),
    "ema": ("--model-ema", "--model-ema-decay", "0.8", *SHORT),
    "fp16": (*EXACT, "--amp", "fp16", "--clip-grad", "1", "--prune-end", "0.5", "--epochs", "3", "--val-interval", "3"),
    "bf16": (*EXACT, "--amp", "bf16", *SHORT),
    "channels last": ("--channels-last", *SHORT),
    "teacher": ("--kd-model-name", "test_vit", *SHORT),
    "compiled": ("--torchcompile", "eager", *SHORT),
    "bfloat16 moments": ("--state-dtype", "bfloat16", *SHORT),
    "int8 moments": ("--state-dtype", "int8", *SHORT),
    "rules": SHORT,
    "layer decay": ("--sparsity", "0", "--layer-decay", "0.6", *SHORT),
}


def train(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    if engine == "zero3" and "--amp" in flags:  # DeepSpeed's own linear layer rounds before it adds the bias
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

        InsertPostInitMethodToModuleSubClasses._enable_mem_efficient_linear = lambda self: None
    run = build(parse(flags))
    skip = run.engine.scaler
    if skip is not None:  # so far up that the first steps' gradients overflow, on one rank before the other
        skip._init_scale = 2.0**20
    history = train_loop(run)
    return {
        "weights": whole_weights(run.engine),
        "ema": {} if run.ema is None else whole_weights(run.engine, run.ema.module),
        "masks": {name: v for (name, key), v in whole_states(run.engine).items() if key == "mask"},
        "steps": run.pruning_steps,
        "scale": None if skip is None else skip.get_scale(),
        "ema_bytes": run.memory.end["ema"],
        "compiled": run.engine.is_compiled,
        "losses": [*history.train_loss, history.eval_loss[-1]],
    }


@functools.cache
def teacher():
    """A file of weights, for ten classes and 32 pixels."""
    torch.manual_seed(9)
    path = Path(tempfile.mkdtemp()) / "teacher.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10, img_size=32).state_dict(), path)
    return str(path)


@functools.cache
def rules():
    """A file that leaves a layer dense: what ZeRO's one prunable part can do of --prune-config."""
    path = Path(tempfile.mkdtemp()) / "rules.yaml"
    path.write_text(f"{LAYER}: skip\n")
    return str(path)


@functools.cache
def on(engine, feature, flags):
    patched = pytest.MonkeyPatch()
    patched.setattr(toolkit.builder.accelerator, "_check_device", lambda config: None)  # fp16 is tried on CPU
    try:
        more = (*FEATURES[feature], "--experiment", f"{engine}-{feature}")
        more += ("--kd-checkpoint", teacher()) if feature == "teacher" else ()
        more += ("--prune-config", rules()) if feature == "rules" else ()
        return run_ranks(train, 2, engine, [*flags, *more], join_group=False)[0]
    finally:
        patched.undo()


@pytest.fixture(scope="module")
def flags(few_digits, tmp_path_factory):
    return tuple(vit_flags(few_digits, tmp_path_factory.mktemp("features"), *SETTINGS, *PRUNED))


QUICK = {
    "norm": ["fsdp2"],
    "agc": ["zero2"],
    "ema": ["zero3"],
    "fp16": ["zero2"],
    "channels last": ["zero2"],
    "compiled": ["zero1"],
    "teacher": ["fsdp2"],
    "rules": ["zero2"],
    "layer decay": ["zero1"],
}
CELLS = [
    pytest.param(engine, feature, marks=() if engine in QUICK.get(feature, ()) else pytest.mark.long)
    for feature in FEATURES
    for engine in SHARDED
    if "moments" not in feature
    and (engine, feature) not in (("fsdp2", "channels last"), ("zero3", "compiled"))  # refused
]


@pytest.mark.parametrize(("engine", "feature"), CELLS)
def test_as_on_ddp(flags, engine, feature):
    """The same masks weight by weight, weights and averages to rounding, and as many updates left out by the scaler."""
    if feature == "fp16" and Version(importlib.metadata.version("deepspeed")) < Version("0.19.8") and engine != "fsdp2":
        pytest.skip("this DeepSpeed lets a loss in float16 overflow on CPU, where only this test asks for it")
    wanted, found = on("ddp", feature, flags), on(engine, feature, flags)
    assert found["masks"].keys() == wanted["masks"].keys()
    assert bool(wanted["masks"]) is (feature != "layer decay")
    for name, mask in wanted["masks"].items():
        assert torch.equal(found["masks"][name], mask), name
    for kind in ("weights", "ema"):
        assert found[kind].keys() == wanted[kind].keys()
        for name, tensor in wanted[kind].items():
            # A key's bias does nothing in attention: its gradient is rounding, which AdamW makes steps of.
            assert "qkv.bias" in name or far(found[kind][name], tensor) < 1e-3, (kind, name)
            assert torch.equal(found[kind][name] == 0, tensor == 0) or "qkv.bias" in name, (kind, name)
    assert found["ema_bytes"] == pytest.approx(wanted["ema_bytes"] / 2, rel=0.02)  # a share on each of two ranks
    assert (found["steps"], found["scale"]) == (wanted["steps"], wanted["scale"])
    assert found["compiled"] is wanted["compiled"] is (feature == "compiled")
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-3)


# Of masks' bits. bfloat16 is rounded by chances of the rank's own (0.04 to 0.06 % were measured); codes are DDP's but
# for the head's: its 640 weights are too few for codes, and ZeRO's slice has them all the same (0.08 and 0.09 %).
DIFFER = {"bfloat16 moments": 0.001, "int8 moments": 0.001}


EXACTLY = [("fsdp2", "int8 moments")]


@pytest.mark.parametrize(
    ("engine", "feature"),
    [
        pytest.param(engine, feature, marks=() if (engine, feature) == ("zero2", "int8 moments") else pytest.mark.long)
        for feature in DIFFER
        for engine in SHARDED
    ],
)
def test_narrow_moments_are_those_of_ddp_to_rounding(flags, engine, feature):
    """As many zeros, and nearly the same."""
    wanted, found = on("ddp", feature, flags)["masks"], on(engine, feature, flags)["masks"]
    assert found.keys() == wanted.keys() != set()
    masks = [torch.cat([held[name].flatten() for name in wanted]) for held in (wanted, found)]
    assert masks[0].sum() == masks[1].sum()
    assert (masks[0] != masks[1]).float().mean() <= (0 if (engine, feature) in EXACTLY else DIFFER[feature])


def refusal(rank, flags):
    os.environ.update(ENGINES["zero3"])
    with pytest.raises(ValueError, match="--torchcompile is not offered with ZeRO-3"):
        build(parse(flags))


def test_what_would_compile_for_ever_is_refused(flags):
    more = (*FEATURES["compiled"], "--experiment", "refused")
    run_ranks(refusal, 2, [*flags, *more], join_group=False)


def test_each_feature_does_something(flags):
    """What is compared above is not what DDP does anyway."""
    plain, fp16, averaged = on("ddp", "compiled", flags), on("ddp", "fp16", flags), on("ddp", "ema", flags)
    for feature in ("agc", "value"):
        assert far(on("ddp", feature, flags)["weights"][LAYER], plain["weights"][LAYER]) > 1e-2, feature
    assert 12 <= fp16["steps"] < 24
    assert far(averaged["ema"][LAYER], averaged["weights"][LAYER]) > 1e-2
    assert far(on("ddp", "teacher", flags)["weights"][LAYER], plain["weights"][LAYER]) > 1e-2


def show(rank, engine, flags):
    """Outputs of the module with and without the averages in it, beside those of plain models of the whole weights."""
    os.environ.update(ENGINES[engine])
    run = build(parse(flags))
    train_loop(run)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for ema in (run.ema.module, None, run.ema.module, None):
        plain = toolkit.builder.run.create_model(parse(flags), 10).eval()
        plain.load_state_dict(whole_weights(run.engine, ema))
        with run.engine.evaluated(ema) as module, torch.no_grad():
            found.append((module.eval()(images), plain(images)))
    return found


FROZEN = ("--layer-decay", "0.5", "--layer-decay-no-opt-scale", "0.2", "--checkpoint-interval", "1")


@pytest.mark.parametrize(
    ("engine", "frozen"),
    [
        *((name, ()) if name == "fsdp2" else pytest.param(name, (), marks=pytest.mark.long) for name in ENGINES),
        ("zero3", FROZEN),
        *(pytest.param(name, FROZEN, marks=pytest.mark.long) for name in ("fsdp2", "zero2")),
    ],
    ids=lambda value: value if isinstance(value, str) else "some frozen" if value else "all trained",
)
def test_an_evaluation_is_of_the_averages_and_training_goes_on_without_them(few_digits, tmp_path, engine, frozen):
    """Also BatchNorm's statistics, which are averaged too, and on each rank; and beside layers that are not trained."""
    more = ("--opt", "adamw", "--model-ema", "--model-ema-decay", "0.8", *SHORT, *frozen, "--experiment", "r")
    for outputs in run_ranks(show, 2, engine, train_flags(few_digits, tmp_path, *more), join_group=False):
        for found, wanted in outputs:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(outputs[0][0], outputs[1][0], rtol=1e-2)


def until_the_stop(rank, engine, flags, stops):
    """Weights and averages at the end; None after a stop that is asked for in the first evaluation's tenth batch."""
    os.environ.update(ENGINES[engine])
    run = build(parse(flags))
    seen, original = 0, run.to_inputs

    def counting(batch):
        nonlocal seen
        seen += not run.engine.module.training
        if stops and rank == 0 and seen == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(batch)

    run.to_inputs = counting
    try:
        train_loop(run)
    except InterruptedRunError:
        return None
    averages = whole_weights(run.engine, run.ema.module)
    return whole_weights(run.engine) | {f"ema.{name}": one for name, one in averages.items()}


@pytest.mark.parametrize(
    "engine", ["zero2", *(pytest.param(name, marks=pytest.mark.long) for name in ("fsdp2", "zero3"))]
)
def test_a_stop_while_the_averages_are_evaluated_saves_the_weights(few_digits, tmp_path, engine):
    more = ("--opt", "adamw", "--model-ema", "--model-ema-decay", "0.8", "--validation-batch-size", "1")
    flags = [*train_flags(few_digits, tmp_path, *more), "--epochs", "2"]
    wanted = run_ranks(until_the_stop, 2, engine, [*flags, "--experiment", "whole"], False, join_group=False)[0]
    parts = [*flags, "--experiment", "parts"]
    assert run_ranks(until_the_stop, 2, engine, parts, True, join_group=False) == [None, None]
    found = run_ranks(until_the_stop, 2, engine, [*parts, "--resume", "auto"], False, join_group=False)[0]
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def built(rank, engine, flags):
    os.environ.update(ENGINES[engine])
    run = build(parse(flags))
    kinds = [type(module) for module in run.engine.module.modules()]
    return sum(issubclass(kind, torch.nn.SyncBatchNorm) for kind in kinds), sum(
        "BatchNorm" in k.__name__ for k in kinds
    )


@pytest.mark.parametrize(
    "engine", [name if name == "fsdp2" else pytest.param(name, marks=pytest.mark.long) for name in SHARDED]
)
def test_sync_bn_is_built(few_digits, tmp_path, monkeypatch, engine):
    """It can run on GPUs only, and DDP does not even begin: tests/gpu has that. On CPU it is refused at start."""
    flags = train_flags(few_digits, tmp_path, "--opt", "adamw", "--sync-bn", "--experiment", "r")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--sync-bn needs GPUs"):
        build(parse(flags))
    monkeypatch.setattr(toolkit.builder.accelerator, "_check_device", lambda config: None)
    for synchronised, norms in run_ranks(built, 2, engine, flags, join_group=False):
        assert synchronised == norms > 0
