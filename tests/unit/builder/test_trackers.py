"""--report-to: the same scalars to every tracker, by Accelerate's classes."""

import contextlib
import json
import sqlite3
import sys
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from toolkit.builder import trackers
from toolkit.builder.trackers import start_trackers
from toolkit.cli import parse

SHORT = ["--epochs", "1", "--opt", "adamwprune", "--sparsity", "0.5", "--prune-frequency", "1"]


class Library:
    """A tracker's package: it notes how runs begin and what they are told."""

    def __init__(self):
        self.begun, self.told, self.finished = [], [], 0

    def init(self, **settings):
        self.begun.append(settings)
        return self

    def log(self, values, step):
        self.told += [(name, step, value) for name, value in values.items()]

    def finish(self):
        self.finished += 1


@pytest.fixture
def libraries(monkeypatch):
    """wandb and trackio as if they were installed."""
    made = {name: Library() for name in ("wandb", "trackio")}
    for name, library in made.items():
        monkeypatch.setitem(sys.modules, name, library)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard", "wandb", "trackio"])
    PartialState(cpu=True)  # Accelerate's trackers ask it who is the main process
    return SimpleNamespace(**made)


def test_every_tracker_is_told_the_same(flags, tmp_path, libraries):
    assert train.main([*flags, *SHORT, "--experiment", "r", "--report-to", "trackio", "tensorboard", "wandb"]) == 0
    events = EventAccumulator(str(tmp_path / "r" / "tb")).Reload()
    written = sorted(
        (tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    )
    assert len({tag for tag, _, _ in written}) > 15
    for library in (libraries.wandb, libraries.trackio):
        assert library.finished == 1
        for (tag, step, value), (tag_of_file, step_of_file, value_of_file) in zip(
            sorted(library.told), written, strict=True
        ):
            assert (tag, step) == (tag_of_file, step_of_file)
            assert value == pytest.approx(value_of_file, rel=1e-6)  # the file has float32
        (begun,) = library.begun
        assert (begun["project"], begun["name"]) == (tmp_path.name, "r")
        assert (begun["config"]["opt"], begun["config"]["world_size"]) == ("adamwprune", 1)


def test_a_run_may_report_to_nobody(flags, tmp_path):
    assert train.main([*flags, *SHORT, "--experiment", "r", "--report-to", "none"]) == 0
    assert not (tmp_path / "r" / "tb").exists()
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["completed"] is True


def test_a_missing_package_is_one_line_before_any_work(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    assert train.main([*flags, "--experiment", "r", "--report-to", "tensorboard", "trackio"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.endswith("--report-to trackio: trackio is not installed; pip install trackio")
    assert not (tmp_path / "r").exists()


def test_what_a_tracker_raises_is_one_line(flags, capsys, libraries, monkeypatch):
    class UsageError(Exception):
        """W&B's, for one who is not logged in."""

    def init(**settings):
        raise UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(libraries.wandb, "init", init)
    assert train.main([*flags, "--experiment", "r", "--report-to", "wandb"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "--report-to wandb: No API key configured. Use `wandb login` to log in.; mend that" in line


def test_a_resumed_run_goes_on_in_its_trackers(flags, tmp_path, libraries):
    config = parse([*flags, "--report-to", "wandb", "trackio", "wandb"])
    for resume_from in (None, tmp_path / "checkpoints" / "step-00000009", None):
        start_trackers(config, {}, tmp_path, resume_from)
    first, again, afresh = libraries.wandb.begun
    assert first["id"] == again["id"] != afresh["id"]
    assert [begun["resume"] for begun in libraries.trackio.begun] == ["never", "allow", "never"]


def test_the_project_may_be_named_by_its_own_variable(flags, tmp_path, libraries, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    start_trackers(parse([*flags, "--report-to", "wandb", "trackio"]), {}, tmp_path, None)
    assert libraries.wandb.begun[0]["project"] == "mine"
    assert libraries.trackio.begun[0]["project"] == tmp_path.parent.name


def test_recipes_name_one_or_several(tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    for text, wanted in (("wandb", ["wandb"]), ("[wandb, tensorboard]", ["wandb", "tensorboard"])):
        recipe.write_text(f"report_to: {text}\n")
        assert parse(["-c", str(recipe)]).report_to == wanted
    assert parse([]).report_to == ["tensorboard"]
    recipe.write_text("report_to: [wandb, mlflow]\n")
    for argv, words in (
        (["-c", str(recipe)], "--report-to 'mlflow' is not known; choose one of tensorboard, wandb, trackio, none"),
        (["--report-to", "none", "wandb"], "--report-to none goes with no other"),
    ):
        with pytest.raises(SystemExit):
            parse(argv)
        assert words in capsys.readouterr().err


def test_wandb_offline(flags, tmp_path, monkeypatch):
    """The library itself, without its server, where it is installed."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train.main([*flags, *SHORT, "--experiment", "r", "--report-to", "wandb", "tensorboard"]) == 0
    (folder,) = (tmp_path / "r" / "wandb").glob("offline-run-*")
    assert folder.name.endswith((tmp_path / "r" / "wandb" / "id").read_text())
    (kept,) = folder.glob("*.wandb")
    events = EventAccumulator(str(tmp_path / "r" / "tb")).Reload()
    assert all(tag.encode() in kept.read_bytes() for tag in events.Tags()["scalars"])


def test_trackio_without_a_server(flags, tmp_path, monkeypatch):
    """The library itself, in its folder of SQLite files."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    assert train.main([*flags, *SHORT, "--experiment", "r", "--report-to", "trackio"]) == 0
    (kept,) = (tmp_path / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(kept)) as base:
        rows = base.execute("select run_name, step, metrics from metrics").fetchall()
    assert {(name, step) for name, step, _ in rows} == {("r", step) for step in (2, 4, 6)}
    assert any("eval/top1" in json.loads(metrics) for _, _, metrics in rows)
