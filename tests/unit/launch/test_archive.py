"""What is committed of a study is all of it: the tables come out of runs.jsonl.xz as they are beside it."""

import dataclasses
import gzip
import lzma
import re
from pathlib import Path

import pytest

from launch.report.__main__ import main
from launch.report.archive import RUNS_FILE, read_runs, unpack, write_runs
from launch.report.report import summary, summary_csv
from launch.report.runs import group_by_method

RESULTS = Path(__file__).parents[3] / "results"
KEPT = sorted(RESULTS.rglob(RUNS_FILE))


def content(path):
    return lzma.decompress(path.read_bytes())  # another liblzma may compress otherwise


def without_folder(runs):
    return [(run.folder.name, dataclasses.replace(run, folder=Path())) for run in runs]


def test_the_large_studies_are_kept():
    assert {str(path.parent.relative_to(RESULTS)) for path in KEPT} >= {
        "demo",
        "digits",
        "digits/resnet50",
        "synthetic",
    }


@pytest.mark.parametrize("path", KEPT, ids=lambda path: str(path.parent.relative_to(RESULTS)))
def test_a_committed_study_reads_back_to_its_tables(path, tmp_path):
    runs, left_out = read_runs(path)
    assert not left_out
    assert summary_csv(group_by_method(runs)).encode() == (path.parent / "summary.csv").read_bytes()
    write_runs(runs, tmp_path / "again.xz")
    assert content(tmp_path / "again.xz") == content(path)


def test_unpacked_runs_are_the_same_runs_in_the_same_order(tmp_path):
    kept = RESULTS / "digits" / "resnet50" / RUNS_FILE
    assert main([str(kept), "--unpack", str(tmp_path / "cells")]) == 0
    runs, again = read_runs(kept)[0], read_runs(tmp_path / "cells")[0]
    assert without_folder(read_runs(again[0].folder)[0]) == without_folder(again[:1])
    assert without_folder(again) == without_folder(runs)
    assert summary(again, group_by_method(again)) == summary(runs, group_by_method(runs))
    write_runs(again, tmp_path / "a.xz")
    write_runs(again, tmp_path / "b.xz")
    assert (tmp_path / "a.xz").read_bytes() == (tmp_path / "b.xz").read_bytes()
    assert content(tmp_path / "a.xz") == content(kept)


def test_a_file_of_before_is_read(tmp_path):
    """It was gzip."""
    kept = RESULTS / "demo" / RUNS_FILE
    before = tmp_path / "runs.jsonl.gz"
    before.write_bytes(gzip.compress(content(kept)))
    assert without_folder(read_runs(before)[0]) == without_folder(read_runs(kept)[0])


def test_many_runs_unpacked_at_once_keep_their_order(tmp_path):
    runs = read_runs(RESULTS / "synthetic" / RUNS_FILE)[0][::-1]
    unpack(runs, tmp_path)
    assert without_folder(read_runs(tmp_path)[0]) == without_folder(runs)


def test_a_report_of_the_file_equals_one_of_the_folders(tmp_path, capsys):
    kept = RESULTS / "demo" / RUNS_FILE
    assert main([str(kept), "--unpack", str(tmp_path / "runs")]) == 0
    texts = []
    for source, name in ((kept, "file"), (tmp_path / "runs", "folders")):
        out = tmp_path / name / "demo"
        assert main([str(source), "--out", str(out)]) == 0
        assert capsys.readouterr().err.endswith(f"\n{out / 'report.md'} and {out / 'report.html'}\n")
        texts.append((out / "report.md").read_text().replace(str(source), "RUNS").replace(str(out), "OUT"))
    assert texts[0] == texts[1]
    for name in ("summary.csv", "summary.json", "all_results.json", RUNS_FILE):
        assert (tmp_path / "file" / "demo" / name).read_bytes() == (tmp_path / "folders" / "demo" / name).read_bytes()


@pytest.mark.parametrize(
    "damage", [b"", b"no xz", lzma.compress(b'{"name": "x"}\n'), lzma.compress(b"{"), lzma.compress(b"{}")[:20]]
)
def test_a_damaged_file_is_named(tmp_path, capsys, damage):
    path = tmp_path / RUNS_FILE
    path.write_bytes(damage)
    with pytest.raises(SystemExit) as stop:
        main([str(path), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert f"{path} is not what launch.report keeps of a study" in capsys.readouterr().err


def test_what_to_write_must_be_said(capsys):
    with pytest.raises(SystemExit):
        main(["runs/demo"])
    assert "give --out for a report, or --unpack for run folders" in capsys.readouterr().err


@pytest.mark.parametrize("report", sorted(RESULTS.rglob("report.md")), ids=lambda path: str(path.relative_to(RESULTS)))
def test_a_kept_report_names_no_folder_of_one_machine(report):
    assert not re.search(r"launch\.\w+[^`]* /", report.read_text())
