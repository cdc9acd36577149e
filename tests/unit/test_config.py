import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from toolkit.builder.data import batch_size_per_rank
from toolkit.cli import parse
from toolkit.config import Config, flags
from toolkit.flag import flag_name

ROOT = Path(__file__).parents[2]


def error_of(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


def test_of_several_ranks_one_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "--sparcity is not a flag" in error_of(capsys, "--sparcity", "0.5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit) as stop:
        parse(["--sparcity", "0.5"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""
    assert waited == [3]  # or the launcher would end the rank that speaks


def test_timms_names_and_defaults():
    config = parse([])
    assert (config.model, config.opt, config.batch_size, config.epochs) == ("resnet50", "sgd", 128, 300)
    assert (config.weight_decay, config.momentum, config.smoothing, config.warmup_epochs) == (2e-5, 0.9, 0.1, 5)
    assert (config.hflip, config.color_jitter, config.scale, config.train_interpolation) == (
        0.5,
        0.4,
        [0.08, 1.0],
        "random",
    )
    assert (config.seed, config.log_interval, config.workers, config.sched) == (42, 50, 4, "cosine")


def test_command_line_beats_recipe_beats_default(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lr: 1e-3\nepochs: 7\nchannels_last: true\nbetas-not: 1\n".replace("betas-not: 1\n", ""))
    config = parse(["-c", str(recipe), "--epochs", "9", "--no-channels-last"])
    assert (config.lr, config.epochs, config.channels_last) == (1e-3, 9, False)
    assert config.given == {"lr", "epochs", "channels_last"}


def test_the_command_line_turns_off_what_a_recipe_turns_on(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("amp: bf16\ntorchcompile: eager\n")
    assert parse(["-c", str(recipe)]).mixed_precision == "bf16"
    config = parse(["-c", str(recipe), "--no-amp", "--no-torchcompile"])
    assert (config.mixed_precision, config.torchcompile) == ("no", None)


@pytest.mark.parametrize(
    ("argv", "precision"),
    [
        ([], "no"),
        (["--amp"], "fp16"),
        (["--amp", "--amp-dtype", "bfloat16"], "bf16"),
        (["--amp", "bf16"], "bf16"),
        (["--amp", "float16"], "fp16"),
        (["--amp", "bf16", "--amp-dtype", "bfloat16"], "bf16"),
    ],
)
def test_amp(argv, precision):
    assert parse(argv).mixed_precision == precision


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sparsty", "0.5"], ["--sparsty is not a flag", "Did you mean --sparsity", "--weight-decay"]),
        (["--sparsity", "1.5"], ["--sparsity 1.5", "[0, 1)"]),
        (["--sched", "cosin"], ["--sched", "'cosin'", "cosine"]),
        (["--epochs", "0"], ["--epochs 0", "at least 1"]),
        (["--prune-begin", "0.7"], ["fractions of all steps"]),
        (["-b", "8", "--global-batch-size", "16"], ["keep one of them"]),
        (["--amp-dtype", "float16"], ["add --amp"]),
        (["--amp", "bf16", "--amp-dtype", "float16"], ["disagree"]),
        (["--sched", "plateau", "--sched-on-updates"], ["drop --sched-on-updates"]),
        (["--amp", "fp16", "--sparsity", "0.5", "--prune-end", "1"], ["--prune-end 0.9 or less"]),
        (["--amp", "int8"], ["'int8'", "choose one of fp16"]),
        (["--opt-kwargs", "x"], ["not key=value"]),
        (["-c", "nowhere.yaml"], ["nowhere.yaml cannot be read"]),
        (["positional"], ["positional is not a flag"]),
        (["/imagenet", "--model", "resnet50"], ["/imagenet is not a flag", "give --data-dir /imagenet"]),
    ],
)
def test_mistakes_are_one_line(capsys, argv, words):
    message = error_of(capsys, *argv)
    assert all(word in message for word in words), message


UNPRINTABLE = ("a\nb", "a\0b", "\ud800")


def bad_values(item):
    """Three lists of arguments, at least, that a flag must refuse."""
    name, meta = flag_name(item.name), item.metadata
    default = item.default_factory() if callable(item.default_factory) else item.default
    if isinstance(default, bool) or meta["kind"] is bool:
        return [[f"{name}={value}"] for value in ("yes", "1", "")]
    if isinstance(default, dict):
        return [[name, "x"], [name, "=1"], [name, "a=1", "b-c=2"]]
    if "in_file" in meta:
        return [[name, str(Path(__file__).parent / file)] for file in ("nosuch.yaml", "conftest.py", "test_config.py")]
    if "choices" in meta:
        return [[name, "nosuch"], [name, "0"], [name, "a\nb"]]
    kind = meta.get("kind") or (type(default) if isinstance(default, (int, float)) else str)
    if kind is str:
        return [[name, value] for value in UNPRINTABLE]
    low, high = (float(end) for end in meta["within"][1:-1].split(", "))
    below = low - 1 if meta["within"][0] == "[" else low
    numbers = ["x", "", "nan", "1e400", str(kind(below)), str(10**400 if high == float("inf") else kind(high) + 1)]
    if "nargs" not in meta:
        return [[name, number] for number in numbers]
    count = meta["nargs"] if isinstance(meta["nargs"], int) else 2
    good = [str(kind(min(high, low + 0.75)))] * count
    more = [[name], [name, *good, *good]] if isinstance(meta["nargs"], int) or "counts" in meta else [[name]]
    return more + [[name, *good[1:], number] for number in numbers]


AT_PARSE = [item for item in flags() if not item.metadata.get("at_build")]  # the others: builder/test_model.py


@pytest.mark.parametrize("item", AT_PARSE, ids=lambda item: flag_name(item.name))
def test_every_flag_refuses_bad_values_in_one_line_that_names_it(capsys, item):
    cases = bad_values(item)
    assert len(cases) >= 3
    for argv in cases:
        message = error_of(capsys, *argv)
        assert flag_name(item.name) in message.replace("-b/--batch-size", "--batch-size"), (argv, message)
        assert "Traceback" not in message


@pytest.mark.parametrize(
    ("argv", "rule"),
    [
        (["--opt-betas", "0.9"], "--opt-betas 0.9 must be 2 or 3 values"),
        (["--crop-pct", "2"], "--crop-pct 2.0 must be in (0, 1]"),
        (["--seed", "99999999999999"], "--seed 99999999999999 must be in [0, 4294967295]"),
        (["--scale", "0", "0"], "--scale 0.0 0.0 must be in (0, 1]"),
        (["--scale", "1", "0.5"], "--scale 1.0 0.5 must be in ascending order"),
        (["--reprob", "2"], "--reprob 2.0 must be in [0, 1]"),
        (["--workers", "-1"], "--workers -1 must be in [0, 1024]"),
        (["--lr", "inf"], "--lr inf must be at least 0 and finite"),
        (["--clip-grad", "0"], "--clip-grad 0.0 must be above 0 and finite"),
        (["--epochs", "2147483648"], "--epochs 2147483648 must be at most 2147483647"),
        (["--cutmix-minmax", "0.5"], "--cutmix-minmax 0.5 must be 2 values"),
        (["--decay-milestones", "9", "3"], "--decay-milestones 9 3 must be in ascending order"),
    ],
)
def test_ranges(capsys, argv, rule):
    assert error_of(capsys, *argv) == f"train.py: error: {rule}\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--scale", "1", "1", "--ratio", "1", "1", "--crop-pct", "1", "--seed", "4294967295", "--workers", "0"],
        ["--opt-betas", "0", "0.9", "0.99", "--lr", "0", "--prune-begin", "0", "--prune-end", "1", "--reprob", "1"],
    ],
)
def test_the_ends_of_the_ranges_are_taken(argv):
    parse(argv)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lerning_rate: 1", "'lerning_rate' in"),
        ("epochs: many", "epochs: 'many'"),
        ("channels_last: 1", "channels_last: 1"),
        ("scale: 0.5", "a list of float"),
        ("[1, 2]", "key: value"),
        ("a: b: c", "is not YAML"),
        ("opt: 3", "opt: 3"),
        ("prune_pattern: 2:4", "prune_pattern: 124 in {path} must be str; put it in quotes"),
        ("scale: [0.5]", "--scale 0.5 must be 2 values"),
        ("seed: -1", "--seed -1 must be in"),
        ("model_kwargs: {1: 2}", "--model-kwargs 1 is no argument's name"),
        ("lr: .nan", "--lr nan must be"),
    ],
)
def test_recipes_are_checked(capsys, tmp_path, text, words):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text)
    assert words.format(path=recipe) in error_of(capsys, "-c", str(recipe))


def test_batch_on_command_line_replaces_the_recipes(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("global_batch_size: 64\n")
    config = parse(["-c", str(recipe), "-b", "10"])
    assert (config.batch_size, config.global_batch_size) == (10, None)
    config = parse(["-c", str(recipe), "--auto-batch-size", "2GiB"])
    assert (config.auto_batch_size, config.global_batch_size) == ("2GiB", None)


def test_global_batch_is_divided_over_ranks_and_accumulation():
    assert batch_size_per_rank(Config(global_batch_size=64, grad_accum_steps=2), 4) == 8
    with pytest.raises(
        ValueError, match=r"3 ranks × accumulation 1 do not divide --global-batch-size 64; use 63 or 66"
    ):
        batch_size_per_rank(Config(global_batch_size=64), 3)
    assert batch_size_per_rank(Config(batch_size=5), 3) == 5


def test_settings_come_back_from_yaml(tmp_path):
    config = parse(
        ["--opt-kwargs", "a=1", "b=x", "--amp", "bf16", "--torchcompile", "--scale", "0.5", "1", "--aa", "rand"]
    )
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    again = parse(["-c", str(path)])
    assert again.to_dict() == config.to_dict()
    assert again.opt_kwargs == {"a": 1, "b": "x"}
    assert again.torchcompile == "inductor"


MODULES = ("launch.matrix", "launch.report", "launch.bench", "shards.digits", "shards.synthetic")
COMMANDS = [["train.py"], *(["-m", module] for module in MODULES)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_help_loads_no_torch(command):
    """--help answers in well under a second because nothing heavy is imported."""
    probe = (
        "import sys, runpy\n"
        f"sys.argv = {[command[-1], '--help']!r}\n"
        "try:\n"
        f"    runpy.{'run_module' if len(command) > 1 else 'run_path'}({command[-1]!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    heavy = sorted({'torch', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules))\n"
        "    print('exit', stop.code, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("exit 0 []\n"), done.stdout[-300:]
    assert "usage" in done.stdout


def test_light_packages_stay_light():
    probe = "import sys, toolkit, toolkit.memory, toolkit.builder.resume; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
