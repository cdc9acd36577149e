"""--state-budget auto is what train.py takes where state pruning is on and nothing is said of its moments."""

from pathlib import Path

import pytest
import yaml

from toolkit.builder.optimizer import create_optimizer, resolve_optimizer, with_state_budget
from toolkit.builder.predict import Prediction
from toolkit.builder.resume import check_same_settings
from toolkit.cli import parse
from toolkit.optim.registry import specs
from toolkit.prune.schedule import Schedule

PRUNED = ["--opt", "adamwprune", "--sparsity", "0.7"]
STATE_PRUNED = sorted(spec.name for spec in specs() if spec.method == "state")
OWN = ["--model", "test_resnet"]


def budget(argv):
    config = with_state_budget(parse([*OWN, *argv]))
    assert with_state_budget(config) == config
    return config.state_budget


@pytest.mark.parametrize("name", STATE_PRUNED)
def test_every_state_pruned_name_has_it_with_a_sparsity(name):
    assert budget(["--opt", name, "--sparsity", "0.7"]) == "auto"
    assert budget(["--opt", name, "--prune-pattern", "2:4"]) == "auto"
    assert budget(["--opt", name, "--sparsity", "0"]) is None
    assert budget(["--opt", name, "--sparsity", "0.7", "--pruning", "none"]) is None


def test_pruning_by_state_has_it_whatever_it_is_called():
    assert budget(["--opt", "adam", "--pruning", "state", "--sparsity", "0.7"]) == "auto"
    assert budget(["--opt", "adam", "--pruning", "magnitude", "--sparsity", "0.7"]) is None
    assert budget(["--opt", "adamw"]) is None


@pytest.mark.parametrize(
    "told",
    [
        ["--state-dtype", "float32"],
        ["--state-dtype", "int8"],
        ["--opt-kwargs", "state_dtype=bfloat16"],
        ["--model-dtype", "bfloat16"],
    ],
)
def test_what_is_said_of_the_moments_goes(told):
    assert budget([*PRUNED, *told]) is None
    assert budget([*PRUNED, "--state-budget", "3.5"]) == 3.5


def test_rules_for_layers_have_no_one_sparsity(tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text("conv: 0.5\n")
    assert budget([*PRUNED, "--prune-config", str(rules)]) is None


def test_the_prediction_counts_with_it():
    rows = [
        Prediction(parse([*OWN, *PRUNED, *more])).ledgers(4)["dense"]["optim.exp_avg_sq"]
        for more in ([], ["--state-budget", "auto"], ["--state-dtype", "float32"])
    ]
    assert rows[0] == rows[1] < rows[2]


def test_float32_moments_may_be_asked_of_all_so_that_a_matrix_can_say_it_once():
    import timm

    for argv in (["--opt", "sgd"], ["--opt", "adamw", "--pruning", "magnitude", "--sparsity", "0.5"]):
        config = parse([*OWN, *argv, "--state-dtype", "float32"])
        opt, _ = resolve_optimizer(config)
        model = timm.create_model("test_resnet", num_classes=3)
        assert "state_dtype" not in create_optimizer(config, model, opt, 0.1, Schedule()).defaults
        with pytest.raises(ValueError, match=r"--state-dtype int8: --opt .* decides by itself"):
            resolve_optimizer(parse([*OWN, *argv, "--state-dtype", "int8"]))
    with pytest.raises(ValueError, match="--state-dtype float32: --opt sgd decides by itself"):
        resolve_optimizer(parse([*OWN, "--opt", "sgd", "--state-dtype", "float32", "--model-dtype", "bfloat16"]))


def made_with(folder: Path, *argv: str):
    (folder / "args.yaml").write_text(yaml.safe_dump(parse([*OWN, *argv]).to_dict()))


def test_a_folder_of_before_the_default_is_float32s(tmp_path):
    made_with(tmp_path, *PRUNED)
    check_same_settings(tmp_path, parse([*OWN, *PRUNED, "--state-dtype", "float32"]))
    with pytest.raises(ValueError, match="state_budget=None, now auto; state_dtype=float32, now None; give"):
        check_same_settings(tmp_path, parse([*OWN, *PRUNED]))
    made_with(tmp_path, *PRUNED, "--model-dtype", "bfloat16")
    check_same_settings(tmp_path, parse([*OWN, *PRUNED, "--model-dtype", "bfloat16"]))


def test_a_folder_of_the_default_goes_on_with_and_without_the_flag(tmp_path):
    made_with(tmp_path, *PRUNED, "--state-budget", "auto")
    check_same_settings(tmp_path, parse([*OWN, *PRUNED]))
    check_same_settings(tmp_path, parse([*OWN, *PRUNED, "--state-budget", "auto"]))
