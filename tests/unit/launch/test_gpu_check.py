import json
import os
import shlex
import signal
import sys
import time

import pytest
import torch
import yaml
from at_batch import at_batch

from launch.gpu_check.__main__ import main
from launch.gpu_check.page import run_row, to_markdown
from launch.gpu_check.parts import PLANS, load_plan
from launch.matrix.cells import load_matrix
from launch.report.archive import read_runs
from launch.start import ROOT, installed
from toolkit.builder import build
from toolkit.cli import parse
from toolkit.engine.loop import train
from toolkit.errors import InterruptedRunError

RESULT = "import json; print('words'); print(json.dumps({'figure': 7}))"
HANG = "import time; print('began', flush=True); time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {HANG}"


def python(code):
    """Code as a part's command, in which braces would be filled in."""
    return f"python -c {shlex.quote(code)}".replace("{", "{{").replace("}", "}}")


def write_plan(path, parts, needs_gpu=False):
    path.write_text(yaml.safe_dump({"needs_gpu": needs_gpu, "parts": parts}))
    return path


def check(tmp_path, plan, *more):
    paths = ["--plan", str(plan), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    status = main([*paths, *more])
    return status, json.loads((tmp_path / "out" / "gpu_check.json").read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_hangs_dies_or_runs_out_of_memory_costs_nobody_else_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.gpu_check.parts.GRACE_S", 1.0)
    codes = {
        "before": RESULT,
        "hangs": HANG,
        "hangs and does not listen": DEAF,
        "dies": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "is wrong": "raise RuntimeError('cuDNN says no')",
        "has no memory": "bytearray(2**62)",
        "has no memory on the device": "import torch; raise torch.OutOfMemoryError('CUDA out of memory')",
        "after": RESULT,
    }
    parts = [{"name": name, "limit_s": 20, "command": python(code)} for name, code in codes.items()]
    for part in parts[1:3]:
        part["limit_s"] = 5
    begin = time.monotonic()
    status, result = check(tmp_path, write_plan(tmp_path / "plan.yaml", parts))
    assert status == 1
    assert time.monotonic() - begin < 60
    ended = {name: part["outcome"] for name, part in result["parts"].items()}
    assert ended == {
        "before": "ok",
        "hangs": "over its limit",
        "hangs and does not listen": "over its limit",
        "dies": "exit status -11",
        "is wrong": "exit status 1",
        "has no memory": "out of memory",
        "has no memory on the device": "out of memory",
        "after": "ok",
    }
    assert result["parts"]["before"]["result"] == result["parts"]["after"]["result"] == {"figure": 7}
    assert "cuDNN says no" in result["parts"]["is wrong"]["stderr"]
    assert "began" in result["parts"]["hangs"]["stdout"]
    text = (tmp_path / "out" / "gpu_check.md").read_text()
    assert "## is wrong: exit status 1" in text
    assert "RuntimeError: cuDNN says no" in text
    assert "no figure of a GPU" in text


def test_a_second_call_does_what_is_left_and_then_what_failed(tmp_path):
    def notes(name):
        return python(f"open({str(tmp_path / 'order')!r}, 'a').write('{name} ')")

    seen = f"import os; p = {str(tmp_path / 'seen')!r}; there = os.path.exists(p); open(p, 'w'); exit(not there)"
    parts = [
        {"name": "first", "limit_s": 30, "command": notes("first")},
        {"name": "fails once", "limit_s": 30, "command": python(seen)},
        {"name": "always", "limit_s": 30, "command": notes("always"), "always": True},
    ]
    late = {"name": "late", "limit_s": 30, "command": notes("late")}
    status, result = check(tmp_path, write_plan(tmp_path / "plan.yaml", parts))
    assert status == 1
    assert result["parts"]["fails once"]["outcome"] == "exit status 1"
    status, result = check(tmp_path, write_plan(tmp_path / "plan.yaml", [*parts, late]))
    assert status == 0
    assert list(result["parts"]) == ["first", "fails once", "always", "late"]
    assert (tmp_path / "order").read_text().split() == ["first", "always", "always", "late"]


def test_the_window_ends_in_time(tmp_path):
    part = {"limit_s": 100, "command": python(HANG)}
    begin = time.monotonic()
    plan = write_plan(tmp_path / "plan.yaml", [{"name": "long", **part}, {"name": "never", **part}])
    status, result = check(tmp_path, plan, "--minutes", "0.3")
    assert status == 1
    assert time.monotonic() - begin < 0.3 * 60
    assert result["parts"]["long"]["outcome"] == "over its limit"
    assert result["not_run"] == ["never"]


def test_a_part_that_is_to_be_killed_is(tmp_path):
    part = {"name": "killed", "limit_s": 3, "command": python(DEAF), "kill": True}
    status, result = check(tmp_path, write_plan(tmp_path / "plan.yaml", [part]))
    assert status == 0
    assert result["parts"]["killed"]["outcome"] == "ok"


def test_memory_before_and_after_a_resume_has_a_table(flags, tmp_path):
    more = [*flags, "--opt", "adamw", "--experiment", "r"]
    stopped = build(parse(more))
    at_batch(stopped, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(InterruptedRunError):
        train(stopped)
    train(build(parse([*more, "--resume", "auto"])))
    row = run_row(read_runs(tmp_path)[0][0], "study")
    ((before, after),) = row["resumes"]
    assert (before["step"], after["step"]) == (10, 12)
    assert before["ledger_bytes"] == after["ledger_bytes"] > 0
    assert before["allocated_bytes"] is after["reserved_bytes"] is None  # never an RSS
    text = to_markdown({"command": "c", "parts": {}, "not_run": [], "runs": [row]})
    line = next(
        line for line in text.split("after a resume, MiB")[1].splitlines() if "study" in line and "10, dense" in line
    )
    assert line.count(f"{before['ledger_bytes'] / 2**20:,.1f}") == 2
    plain = to_markdown({"command": "c", "parts": {}, "not_run": [], "runs": [{**row, "resumes": []}]})
    assert "after a resume" not in plain


@pytest.mark.parametrize(
    "content",
    ["- a", "parts: []", "{needs_gpu: true, parts: [{name: x}]}", "{needs_gpu: true, parts: [{nme: x}]}", "a: ["],
)
def test_a_file_that_is_no_plan_is_named(tmp_path, content):
    (tmp_path / "plan.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"plan\.yaml is no plan"):
        load_plan(tmp_path / "plan.yaml", [], tmp_path, tmp_path)


@pytest.mark.parametrize("name", ["window.yaml", "stand-in.yaml"])
def test_every_command_of_a_plan_is_one_that_can_start(tmp_path, name, monkeypatch):
    """Each names a program and module that are there; the matrix ones choose cells, no two the same but for a kill."""
    monkeypatch.chdir(ROOT)
    from launch.matrix.__main__ import main as matrix

    needs_gpu, parts = load_plan(PLANS / name, [tmp_path / "photos", tmp_path / "more"], tmp_path / "w", tmp_path / "o")
    assert needs_gpu == (name == "window.yaml")
    assert len({part.name for part in parts}) == len(parts)
    assert any(part.name.endswith(", more") for part in parts)
    for part in parts:
        words = shlex.split(part.command)
        assert installed(words)[0] == sys.executable
        if words[:3] == ["python", "-m", "launch.matrix"]:
            assert matrix([*words[3:], "--dry-run"]) == 0
            assert len(load_matrix(ROOT / words[3]).cells) >= 1
        else:
            assert words[:2] == ["python", "-m"] or words[0] == "torchrun"
