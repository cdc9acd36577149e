"""--model-dtype bfloat16, one rank: bytes as predicted, which optimizer rounds how, weights that others can read."""

import json

import pytest
import timm
import torch
from ranks import reset_accelerate
from test_train import PRUNED, assert_same, final_state, make
from torch import nn

import train
from launch.export import main as export
from launch.report.archive import read_runs
from launch.run_model import run_model, run_weights
from toolkit.engine.loop import train as train_loop
from toolkit.optim.packed import PackedOptimizer
from toolkit.prune.moments import CODED_FROM

BFLOAT16 = ["--model-dtype", "bfloat16", "--epochs", "2"]
CASES = {
    "a budget": [*PRUNED, "--state-budget", "auto"],
    "int8": [*PRUNED, "--state-dtype", "int8"],
    "no dtype asked for": PRUNED,
    "movement": ["--opt", "adamw", "--pruning", "movement", "--sparsity", "0.7"],
    "displacement": ["--opt", "adamw-movement", "--sparsity", "0.7", "--prune-score", "displacement"],
    "plain": ["--opt", "sgd"],
}
# Bytes of weight, gradient and state a weight; with int8 as if the layers too small for codes had them.
MOST = {"a budget": 6.6, "int8": 4.8, "no dtype asked for": 5.4}
QUICK = ("a budget", "movement")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.long) for c in CASES])
def test_the_ledger_is_the_predictions_to_the_byte(flags, tmp_path, case):
    run = make(flags, *BFLOAT16, *CASES[case], "--experiment", "r")
    norms = [module for module in run.engine.module.modules() if isinstance(module, nn.BatchNorm2d)]
    in_norms = {id(tensor) for module in norms for tensor in module.parameters()}
    for tensor in run.engine.module.parameters():
        assert tensor.dtype is (torch.float32 if id(tensor) in in_norms else torch.bfloat16)
    assert {module.running_var.dtype for module in norms} == {torch.float32}
    train_loop(run)
    report = json.loads((tmp_path / "r" / "memory.json").read_text())
    rows = {row["name"]: row for row in report["ledger"]["rows"]}
    assert all(row["measured_bytes"] == row["predicted_bytes"] for row in rows.values())
    peaks = [phase for name, phase in report["phases"].items() if name == "final" and "backward" in phase["at"]]
    assert bool(peaks) is (case != "plain")  # nothing is pruned
    if case == "int8":  # which layers are too small for codes, and what is left in them, only masks know
        peaks = []
    for row in (row for phase in peaks for row in phase["rows"]):
        assert row["difference_bytes"] == 0, row
    num_weights = sum(parameter.numel() for parameter in run.engine.module.parameters())
    weights_bytes = sum(parameter.nbytes for parameter in run.engine.module.parameters())
    assert rows["weights"]["measured_bytes"] == rows["gradients"]["measured_bytes"] == weights_bytes
    assert 2 * num_weights < weights_bytes < 2.1 * num_weights
    (kept,) = read_runs(tmp_path)[0]
    assert kept.weights == num_weights  # not half the bytes
    state_bytes = report["ledger"]["optimizer_bytes"]
    if case == "int8":
        states = run.engine.inner_optimizer.state
        coded = {parameter: kept["exp_avg"].dtype is torch.uint8 for parameter, kept in states.items()}
        assert all(is_coded == (p.ndim > 1 and p.numel() >= CODED_FROM) for p, is_coded in coded.items())
        survivors = {parameter: kept["exp_avg"].numel() for parameter, kept in states.items()}
        # Two moments of a byte or of four, and a bit of each prunable weight; the rest are exponents and offsets.
        moments = sum(2 * count * (1 if coded[parameter] else 4) for parameter, count in survivors.items())
        bits = sum(parameter.numel() for parameter, kept in states.items() if "mask" in kept) / 8
        assert state_bytes == pytest.approx(moments + bits, rel=0.02)
        state_bytes -= sum(6 * count for parameter, count in survivors.items() if not coded[parameter])
    if case in MOST:
        assert (2 * weights_bytes + state_bytes) / num_weights <= MOST[case]


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (PRUNED, "bfloat16"),
        ([*PRUNED, "--state-dtype", "float32"], "float32"),
        ([*PRUNED, "--state-budget", "3"], "bfloat16"),  # of all weights; more would be above 3 bytes a weight
        (["--opt", "adamwspam"], "bfloat16"),
        (["--opt", "adamwspam", "--pruning", "magnitude", "--sparsity", "0.5"], None),
        (["--opt", "adamw"], None),
        (["--opt", "lamb"], None),
    ],
)
def test_weights_are_rounded_by_chance_or_a_line_says_that_they_are_not(flags, caplog, more, wanted):
    caplog.set_level("INFO", logger="toolkit")
    optimizer = make(flags, *BFLOAT16, *more).engine.inner_optimizer
    said = [record.message for record in caplog.records if "rounds weights to the nearest" in record.message]
    assert len(said) == (wanted is None)
    if wanted is not None and "--state-budget" not in more:
        assert isinstance(optimizer, PackedOptimizer)
        assert optimizer.defaults["state_dtype"] == wanted


def test_an_update_within_backward_changes_no_bit(flags, tmp_path):
    for name, more in (("plain", []), ("fused", ["--fused-backward"])):
        train_loop(make(flags, *BFLOAT16, *PRUNED, *more, "--experiment", name))
        reset_accelerate()
    plain, fused = (final_state(tmp_path / name)["model"] for name in ("plain", "fused"))
    assert_same(plain, fused)


def test_what_is_exported_is_read_in_float32(flags, tmp_path):
    assert train.main([*flags, *BFLOAT16, *PRUNED, "--experiment", "r"]) == 0
    out = tmp_path / "model.safetensors"
    assert export([str(tmp_path / "r"), "--out", str(out)]) == 0
    model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(out))
    saved = final_state(tmp_path / "r")["model"]
    assert saved["fc.weight"].dtype is torch.bfloat16
    assert all(torch.equal(value, saved[key].to(value.dtype)) for key, value in model.state_dict().items())
    source, weights, _ = run_weights(tmp_path / "r")
    mine, _, _ = run_model(source, weights)
    assert_same(dict(mine.state_dict()), dict(model.state_dict()))
    assert export([str(tmp_path / "r"), "--out", str(tmp_path / "p.safetensors"), "--packed"]) == 0
