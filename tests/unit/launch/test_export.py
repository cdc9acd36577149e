"""What a run exports is what timm loads, and what was pruned costs a bit."""

import json
import math

import pytest
import timm
import torch
from flags import train_flags
from ranks import reset_accelerate

import train
from launch.export import main
from launch.packing import load_packed, pack_weights
from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint
from toolkit.engine.evaluate import evaluate
from toolkit.engine.loop import train as train_loop


@pytest.fixture
def flags(few_digits, tmp_path):
    return train_flags(few_digits, tmp_path, "--epochs", "2", "--opt", "adamwprune", "--sparsity", "0.7")


def test_timm_loads_it_and_it_scores_the_same(flags, tmp_path, capsys):
    assert train.main([*flags, "--experiment", "r"]) == 0
    reset_accelerate()
    out = tmp_path / "model.safetensors"
    assert main([str(tmp_path / "r"), "--out", str(out)]) == 0
    model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(out))
    saved = load_checkpoint(newest_checkpoint(tmp_path / "r" / "checkpoints"))["model"]
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    run = build(parse([*flags, "--experiment", "other"]))
    wanted = json.loads((tmp_path / "r" / "metrics.json").read_text())
    found = evaluate(run, model)
    assert found.top1 == wanted["final_top1"]
    assert found.loss == pytest.approx(wanted["eval_loss"][-1], rel=1e-6)
    capsys.readouterr()
    packed = tmp_path / "packed.safetensors"
    assert main([str(tmp_path / "r"), "--out", str(packed), "--packed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["share"] < 0.40  # a small model has many weights that are not prunable
    again = load_packed(packed)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], value) and again[key].dtype == value.dtype for key, value in saved.items())
    with pytest.raises(ValueError, match="not a packed export"):
        load_packed(out)


def test_resnet50_at_70_percent_takes_a_third():
    weights = timm.create_model("resnet50").state_dict()
    generator = torch.Generator().manual_seed(0)
    for weight in weights.values():
        if weight.ndim > 1:
            weight.view(-1)[torch.rand(weight.numel(), generator=generator) < 0.7] = 0.0
            weight.view(-1)[0] = -0.0
    packed = pack_weights(weights)
    assert sum(t.nbytes for t in packed.values()) <= 0.35 * sum(t.nbytes for t in weights.values())
    values = packed["conv1.weight.values"]
    assert math.copysign(1, float(values[0])) == -1  # -0.0 is kept as it is


def test_an_average_and_mistakes(flags, tmp_path, capsys):
    assert train.main([*flags, "--experiment", "r", "--model-ema"]) == 0
    for more in (["--model-ema"], ["--no-model-ema"]):
        assert main([str(tmp_path / "r"), "--out", str(tmp_path / "x.safetensors"), *more, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["average"] is (more == ["--model-ema"])
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--out", str(tmp_path / "x")])
    assert stop.value.code == 2
    assert "has no last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("opt", [["--opt", "adamwprune"], ["--opt", "momentum", "--pruning", "magnitude"]])
def test_a_pruned_model_is_fine_tuned_at_unchanged_sparsity(flags, tmp_path, opt):
    """Another number of classes: the classifier starts anew, the zeros of all other layers stay from the first step."""
    assert train.main([*flags, "--experiment", "r"]) == 0
    reset_accelerate()
    source = newest_checkpoint(tmp_path / "r" / "checkpoints")
    before = load_checkpoint(source)["model"]
    start = tmp_path / "r" if "momentum" in opt else source  # the run, or one checkpoint of it
    more = ["--initial-checkpoint", str(start), "--num-classes", "12", "--experiment", "tuned"]
    run = build(parse([*flags, *opt, *more]))
    seen = []
    original = run.augment

    def watching(*batch):
        seen.append([bool((p[before[name] == 0] == 0).all()) for name, p in run.prunable if not name.startswith("fc")])
        return original(*batch)

    run.augment = watching
    train_loop(run)
    assert len(seen) == 12
    assert all(all(one) for one in seen)  # at every step, so no dense phase
    zeros, weights = run.sparsity()
    assert zeros == math.floor(0.7 * weights)
    assert dict(run.engine.module.named_parameters())["fc.weight"].shape[0] == 12
