"""timm's command line: each flag of its train.py is offered, taken without effect, or refused as the docs say."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from timm.scheduler import create_scheduler_v2

from toolkit.cli import parse
from toolkit.config import Config, flags
from toolkit.flag import flag_name
from toolkit.timm_flags import IDLE, NOT_OFFERED

ROOT = Path(__file__).parents[2]
ARGS = Path(__file__).with_name("timm_args.yaml")  # with timm's version
TIMMS = yaml.safe_load(ARGS.read_text())
ALIASES = {"--config", "--dr", "--train-steps-per-epoch"}
FLAGS = ALIASES | {flag_name(key) for key in TIMMS.keys() - {"data", "local_rank"}}
OFFERED = {"--config", "--dr"} | {flag_name(item.name) for item in flags()}
WITHOUT_EFFECT, REFUSED = ({flag_name(name) for name in names} for names in (IDLE, NOT_OFFERED))


def test_every_flag_of_timm_has_one_answer():
    assert len(FLAGS) == 173
    assert FLAGS == (FLAGS & OFFERED) | WITHOUT_EFFECT | REFUSED
    assert OFFERED.isdisjoint(WITHOUT_EFFECT | REFUSED)
    assert WITHOUT_EFFECT.isdisjoint(REFUSED)


def error_of(capsys, *argv):
    with pytest.raises(SystemExit):
        parse(argv)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize("name", sorted(NOT_OFFERED))
def test_what_is_not_offered_says_why(capsys, name):
    message = error_of(capsys, flag_name(name), "1")
    assert f"{flag_name(name)} is timm's and not offered here: {NOT_OFFERED[name][1]}; see docs/timm.md" in message


@pytest.mark.parametrize("name", sorted(IDLE))
def test_what_changes_nothing_is_said(name):
    has_value, reason = IDLE[name]
    config = parse([flag_name(name), *["1"] * has_value])
    assert config.notes == (f"{flag_name(name)} changes nothing: {reason}",)
    assert config.to_dict() == Config().to_dict()


def test_the_docs_have_a_row_for_each():
    text = (ROOT / "docs" / "timm.md").read_text().partition("## Taken")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `-")]
    told = sorted((flag, why.replace("`", "")) for flags, why in rows for flag in re.findall(r"`(--[\w-]+)`", flags))
    reasons = {name: reason for table in (IDLE, NOT_OFFERED) for name, (_, reason) in table.items()}
    assert told == sorted((flag_name(name), reason) for name, reason in reasons.items())


def test_every_schedule_of_the_installed_timm_is_offered():
    choices = next(item for item in flags() if item.name == "sched").metadata["choices"]
    told = re.search(r"sched: (.*?)num_epochs:", inspect.getdoc(create_scheduler_v2), re.DOTALL)[1]
    assert set(choices) == set(re.findall(r"'(\w+)'", told.partition("'constant' holds")[0]))
    for name in choices:
        create_scheduler_v2(
            torch.optim.SGD([torch.zeros(1)], lr=1.0), name, num_epochs=9, decay_epochs=3, warmup_epochs=1
        )


def test_a_timm_runs_settings_are_our_defaults():
    config = parse(["-c", str(ARGS)])
    assert config.to_dict() == Config().to_dict()
    (note,) = config.notes
    assert re.search(r"is of a timm run: \d+ settings are taken, \d+ that are not offered here left out", note)


def timm_run(folder, **changes):
    path = folder / "args.yaml"
    path.write_text(yaml.safe_dump({**TIMMS, **changes}))
    return str(path)


def test_a_timm_runs_own_words_are_read(tmp_path):
    path = timm_run(
        tmp_path,
        data="shards",
        amp=True,
        amp_dtype="bfloat16",
        aug_repeats=3.0,
        decay_epochs=2.4,
        torchcompile="inductor",
        input_size=[3, 160, 160],
        opt_kwargs={"foreach": False},
        mean=[0.5],
        device="cpu",
        no_prefetcher=True,
    )
    config = parse(["-c", path, "--epochs", "7"])
    assert parse(["--aug-repeats", "3.0"]).aug_repeats == 3, "the command line reads what a file does"
    assert (config.data_dir, config.mixed_precision, config.aug_repeats) == ("shards", "bf16", 3)
    assert (config.decay_epochs, config.torchcompile, config.sides, config.mean) == (2.4, "inductor", (160, 160), [0.5])
    assert (config.opt_kwargs, config.epochs, config.output) == ({"foreach": False}, 7, "runs")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kd_distill_type": "token"}, "kd_distill_type: 'token' in {} is timm's and not offered here: a teacher's sc"),
        ({"tta": 3}, "take the line out to train without it (docs/timm.md)"),
        ({"learning_rate": 3}, "'learning_rate' in {} is not a setting"),
        ({"epochs": "many"}, "epochs: 'many' in {} must be int"),
        ({"epochs": 1.5}, "epochs: 1.5 in {} must be int"),
    ],
)
def test_what_a_timm_run_did_and_is_not_offered_is_one_line(capsys, tmp_path, changes, words):
    path = timm_run(tmp_path, **changes)
    assert words.format(path) in error_of(capsys, "-c", path)
