"""The leaves that commands share: tables and sizes, errors in one line, whole files."""

import argparse
import csv
import io
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.command import one_line_errors, spelled
from toolkit.files import csv_text, write_json
from toolkit.markdown import MIB, mib, table

ROOT = Path(__file__).parents[2]
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


def test_a_size_is_mib_with_a_unit_of_2_to_the_20():
    assert mib(1536 * MIB + MIB // 4) == "1,536.25"
    assert mib(10 * 1024 * 1024, 0) == "10"
    assert mib(None) == "–"


def test_a_table_sets_figures_right():
    assert table(["a", "b"], [["x", 1], ["y", 22]]) == ["| a | b |", "| --- | ---: |", "| x | 1 |", "| y | 22 |"]
    assert table(["a", "b"], [], text=range(2))[1] == "| --- | --- |"
    assert table(["a", "b"], [], text=())[1] == "| ---: | ---: |"


@pytest.mark.parametrize("error", [ValueError("n=3 is odd; use 4"), FileNotFoundError(2, "No such file", "x")])
def test_what_a_user_can_mend_is_one_line(capsys, error):
    parser = argparse.ArgumentParser(prog="python -m launch.thing")
    with pytest.raises(SystemExit) as stop, one_line_errors(parser):
        raise error
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"launch.thing: error: {error}\n"


def test_a_missing_package_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors(argparse.ArgumentParser(prog="python -m launch.thing")):
        import no_such_package  # noqa: F401
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "launch.thing: error: no_such_package is not installed; install this package with its [all] extra, or from a "
        "checkout by make setup\n"
    )


def test_ctrl_c_says_what_is_left(capsys):
    parser = argparse.ArgumentParser(prog="python -m launch.thing")
    with pytest.raises(SystemExit) as stop, one_line_errors(parser, "half of x"):
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\nlaunch.thing: stopped; half of x\n"


# Each stops in the midst of its first heavy import.
@pytest.mark.parametrize(
    ("module", "heavy", "flags"),
    [
        ("shards.digits", "sklearn", ["--out", "{out}"]),
        ("shards.synthetic", "numpy", ["--out", "{out}"]),
        ("launch.report", "torch", ["results/demo/runs.jsonl.xz", "--out", "{out}"]),
        ("launch.estimate", "torch", ["launch/matrices/digits.yaml"]),
    ],
)
def test_ctrl_c_while_importing_is_one_line(module, heavy, flags, tmp_path):
    handler = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a suite in the background ignores it
    (tmp_path / f"{heavy}.py").write_text(f"import os, signal\n{handler}\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", module, *(flag.format(out=tmp_path / "out") for flag in flags)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr.startswith(f"\n{module}: stopped; ")
    assert done.stderr.count("\n") == 2


def test_what_is_our_own_fault_is_not_hidden():
    with pytest.raises(ZeroDivisionError), one_line_errors(argparse.ArgumentParser()):
        raise ZeroDivisionError
    with pytest.raises(ModuleNotFoundError), one_line_errors(argparse.ArgumentParser()):
        import toolkit.no_such_module  # noqa: F401


def test_a_command_can_be_pasted():
    assert shlex.split(spelled("launch.x", ["a b", "--out", "c"])) == ["python", "-m", "launch.x", "a b", "--out", "c"]


@given(st.lists(st.fixed_dictionaries({"a": WORDS, "b": WORDS}), max_size=4))
def test_csv_reads_back(rows):
    assert list(csv.DictReader(io.StringIO(csv_text(["a", "b"], rows), newline=""))) == rows


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "new" / "x.json"
    write_json(path, {"b": [1.5, None]})
    with pytest.raises(TypeError):
        write_json(path, {"b": object()})
    assert json.loads(path.read_text()) == {"b": [1.5, None]}
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


PAGES = """
import resource, sys, torch
from toolkit.process import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no glibc")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):  # glibc 2.36 takes some turns to fit aligned pieces into what was freed
    torch.ones(1 << 24)
before = faults()
for _ in range(8):
    torch.ones(1 << 24)
print((faults() - before) * resource.getpagesize() / (1 << 26))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(("malloc", "low", "high"), [("keep", 0, 2), ("system", 7, 9)])
def test_freed_memory_is_used_again_without_new_pages(malloc, low, high):
    """Eight tensors of 64 MiB, one after the other: new pages of each, or of none."""
    done = subprocess.run([sys.executable, "-c", PAGES, malloc], cwd=ROOT, capture_output=True, text=True, check=True)
    assert low <= float(done.stdout) <= high
