"""Reports of made-up accuracies around real run folders (results/demo): tables, files, the HTML page."""

import base64
import csv
import dataclasses
import hashlib
import html.parser
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from docs_text import sentences, words

from launch.report.__main__ import main
from launch.report.archive import read_runs, unpack
from launch.report.pictures_study import series
from launch.report.report import write_report
from launch.report.runs import group_by_method
from launch.report.verdict import picks, verdict_section

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "results"
DEMO = RESULTS / "demo" / "runs.jsonl.xz"
TOP1 = {  # label -> seed -> final top-1
    "resnet18_adamw_none": {0: 99.0, 1: 99.2, 2: 99.1},
    "resnet18_adamw_movement_70": {0: 97.0, 1: 97.2, 2: 97.1},
    "resnet18_adamwprune_state_70": {0: 99.0, 1: 99.3, 2: 99.1},
    "resnet18_momentum_movement_70": {0: 98.9, 1: 99.4, 2: 99.1},
}


@pytest.fixture
def runs(tmp_path):
    folder, cells = tmp_path / "runs", tmp_path / "demo"
    unpack(read_runs(DEMO)[0], cells)
    shutil.rmtree(cells / "resnet18_adamwprune_state_70_seed0")  # the default, with a budget
    (cells / "resnet18_adamwprune_state_70_state-dtype=float32_seed0").rename(
        cells / "resnet18_adamwprune_state_70_seed0"
    )
    for name, results in TOP1.items():
        for seed, top1 in results.items():
            cell = shutil.copytree(cells / f"{name}_seed0", folder / f"{name}_seed{seed}")
            metrics = json.loads((cell / "metrics.json").read_text())
            metrics |= {"seed": seed, "final_top1": top1, "best_top1": top1 + 0.1, "steps_per_epoch": 22}
            (cell / "metrics.json").write_text(json.dumps(metrics))
            settings = yaml.safe_load((cell / "args.yaml").read_text())
            (cell / "args.yaml").write_text(yaml.safe_dump(settings | {"seed": seed, "state_dtype": None}))
            (cell / "memory_timeline.csv").write_text(
                "rank,step,phase,ledger_bytes,optimizer_bytes,alloc_retries\n0,11,dense,1000,500,\n0,22,final,800,300,\n"
            )
    return folder


@pytest.fixture
def report(runs, tmp_path):
    out = tmp_path / "study"
    assert main([str(runs), "--out", str(out)]) == 0
    return out


def test_methods_are_ranked_only_where_they_differ(report):
    text = (report / "report.md").read_text()
    minute = text[text.index("## In a minute") : text.index("## Ranking")]
    best = "adamwprune 70 % | 99.13 ± 0.15 | 2.53"
    taken = "**adamwprune 70 %** | 99.13 ± 0.15 (3) | 8.00 | 2.53 | – | adamwprune 70 %: 99.13 ± 0.15"
    assert f"| **70 % sparsity** | {taken} | adamw: +0.03 ± 0.06 [-0.11, +0.18] | 1 / 1 / 0 |" in minute
    rival = "adamw + movement 70 % | 97.10 ± 0.10 | 12.12 | +2.03 ± 0.06 [+1.89, +2.18] | beyond noise"
    assert f"| {best} | {rival} | 1 / 1 / 0 |" in minute
    section = text[text.index("### 70 %") : text.index("Final epoch; mean")].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section if line.startswith("| ")]
    rows = {name: rest for name, *rest in cells}
    assert rows["adamw + movement 70 %"][3] == "3"
    assert rows["adamwprune 70 %"][3] == "1–2"
    assert rows["momentum + movement 70 %"][3] == "1–2"
    assert rows["adamw + movement 70 %"][4].startswith("+2.03 ± ")


@pytest.mark.parametrize("name", ["adamw", "resnet18_adamw_none_seed2"])
def test_rankings_against_a_baseline(runs, tmp_path, name):
    assert main([str(runs), "--out", str(tmp_path / "out.md"), "--baseline", name]) == 0
    text = (tmp_path / "out.md").read_text()
    assert text.count("| adamw − this |") == 2  # dense, and at 70 %
    assert re.search(r"\| adamw \+ movement 70 % \|.*\| \+2\.00 ± 0\.05 \[\+1\.88, \+2\.12\] \|", text)
    assert "--baseline adamw`" in text


def test_a_baseline_that_is_not_there_is_an_error(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(runs), "--out", str(tmp_path / "out.md"), "--baseline", "lion"])
    assert "--baseline lion is no method or run of these; there are " in capsys.readouterr().err
    assert not (tmp_path / "out.md").exists()


def test_the_cheapest_inside_the_spread_is_recommended(runs, tmp_path):
    for seed, top1 in {0: 98.9, 1: 99.6, 2: 99.2}.items():  # above adamwprune by 0.1 ± 0.2
        path = runs / f"resnet18_momentum_movement_70_seed{seed}" / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"final_top1": top1}))
    assert main([str(runs), "--out", str(tmp_path / "study")]) == 0
    text = (tmp_path / "study" / "report.md").read_text()
    use = "**adamwprune 70 %** | 99.13 ± 0.15 (3) | 8.00 | 2.53 | +0.10 ± 0.20 [-0.40, +0.60]"
    assert f"| **70 % sparsity** | {use} | momentum + movement 70 %: 99.23 ± 0.35 |" in text


def test_what_takes_no_more_bytes_and_scores_higher_is_taken_instead(runs, tmp_path):
    """The cheapest row level with the best scatters widely; another within its bytes scores higher."""
    scores = {
        "adamw_movement": (99.2, 99.2, 99.2),
        "momentum_movement": (98.2, 99.4, 98.8),
        "adamwprune_state": (99.0,) * 3,
    }
    for name, values in scores.items():
        for seed, top1 in enumerate(values):
            path = runs / f"resnet18_{name}_70_seed{seed}" / "metrics.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"final_top1": top1}))
    (pick,) = [pick for pick in picks(group_by_method(read_runs(runs)[0])) if pick.sparsity]
    assert (pick.name, pick.best) == ("adamwprune 70 %", "adamw + movement 70 %")
    assert pick.below_best is not None
    assert pick.below_best.beyond_spread
    assert (pick.behind, pick.ahead) == (0, 1)


def copy_of(folder, name, **settings):
    """The run of seed 0 again, with other settings."""
    cell = shutil.copytree(folder / "resnet18_adamwprune_state_70_seed0", folder / name)
    (cell / "args.yaml").write_text(yaml.safe_dump(yaml.safe_load((cell / "args.yaml").read_text()) | settings))


def test_a_setting_is_named_where_it_is_not_the_usual_one(runs):
    for regrow in (0.1, 0.3):
        copy_of(runs, f"regrow={regrow}", prune_regrow=regrow, prune_end=0.4)
    copy_of(runs, "third", prune_end=0.4, prune_scope="layer")
    groups = group_by_method(read_runs(runs)[0])
    ours = {label: series(label, members) for label, members in groups.items() if label.startswith("adamwprune")}
    assert ours == {  # half have each prune_end but three of four regrow nothing
        "adamwprune 70 % prune_end=0.6": "adamwprune prune_end=0.6",
        "adamwprune 70 % prune_regrow=0.1": "adamwprune prune_regrow=0.1",
        "adamwprune 70 % prune_regrow=0.3": "adamwprune prune_regrow=0.3",
        "adamwprune 70 % prune_scope=layer": "adamwprune prune_scope=layer",
    }


def test_among_as_many_the_default_is_not_named(runs):
    copy_of(runs, "regrow", prune_regrow=0.1)
    copy_of(runs, "both", prune_regrow=0.1, lr=0.5)
    copy_of(runs, "rate", lr=0.5)
    labels = [label for label in group_by_method(read_runs(runs)[0]) if label.startswith("adamwprune 70 %")]
    (rate,) = {run.lr for run in read_runs(runs)[0] if run.optimizer == "adamwprune"} - {0.5}
    ends = [f"lr={rate:g}", "lr=0.5", f"lr={rate:g} prune_regrow=0.1", "lr=0.5 prune_regrow=0.1"]
    assert sorted(labels) == sorted(f"adamwprune 70 % {end}" for end in ends)


def test_a_setting_that_came_after_a_run_has_its_default(runs):
    """Seeds of a study that ran over several versions are one row, whether 90 was written as 90 or 90.0."""
    before = {label: len(members) for label, members in group_by_method(read_runs(runs)[0]).items()}
    path = runs / "resnet18_adamwprune_state_70_seed0" / "args.yaml"
    settings = yaml.safe_load(path.read_text())
    assert settings["decay_epochs"] == 90
    del settings["prune_shrink"]
    path.write_text(yaml.safe_dump(settings | {"decay_epochs": 90.0, "prune_shrink": False}))
    assert {label: len(members) for label, members in group_by_method(read_runs(runs)[0]).items()} == before
    path.write_text(yaml.safe_dump(settings | {"prune_ends": True}))
    assert len(group_by_method(read_runs(runs)[0])) == len(before) + 1


def test_one_run_in_two_folders_is_an_error(runs, tmp_path, capsys):
    copy_of(runs, "again")
    with pytest.raises(SystemExit):
        main([str(runs), "--out", str(tmp_path / "out")])
    assert "are the same run (settings and seed); move one elsewhere" in capsys.readouterr().err


def test_files_for_others_programs(report):
    with open(report / "summary.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["adamw"]["top1_mean"]) == pytest.approx(99.1)
    assert float(rows["adamw"]["top1_stdev"]) == pytest.approx(0.1)
    assert rows["adamwprune 70 %"]["seeds"] == "0 1 2"
    results = json.loads((report / "all_results.json").read_text())
    assert len(results) == 12
    mine = next(one for one in results if one["test_id"] == "resnet18_adamwprune_state_70_seed1")
    assert mine["final_accuracy"] == 99.3
    assert mine["optimizer"] == "adamwprune"
    assert mine["gpu_memory_mean"] is None  # there was no GPU
    assert mine["success"] is True
    for name in ("args.yaml", "metrics.json", "memory.json", "summary.csv"):
        assert (report / "cells" / "resnet18_adamw_none_seed2" / name).exists()


class _Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def test_the_page_needs_no_network_and_is_accessible(report):
    text = (report / "report.html").read_text()
    page = _Page(text)
    tags = page.tags
    assert ("html", {"lang": "en"}) in tags
    assert any(tag == "meta" and "width=device-width" in a.get("content", "") for tag, a in tags)
    assert len([1 for tag, _ in tags if tag == "h1"]) == 1
    assert len([1 for tag, _ in tags if tag == "main"]) == 1
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    charts = [a for _, a in tags if a.get("class") == "chart"]
    assert [a["id"] for a in charts] == ["pareto", "memory_timeline", "accuracy", "sparsity"]
    assert all(a["role"] == "img" and len(a["aria-label"]) > 30 for a in charts)
    assert all((report / f"{a['id']}.png").exists() for a in charts)  # what report.md shows
    assert all(a.get("scope") == "col" for tag, a in tags if tag == "th")
    regions = [a for _, a in tags if a.get("class") == "table"]
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in regions)
    assert len({a["aria-label"] for a in regions}) == len(regions)  # landmarks have names of their own
    assert not [a for _, a in tags if "src" in a]
    assert not [1 for tag, _ in tags if tag in ("img", "link", "iframe")]
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["href"][1:] in ids for tag, a in tags if tag == "a" and a["href"].startswith("#"))


def test_the_page_runs_its_own_two_scripts_and_asks_for_nothing(report):
    text = (report / "report.html").read_text()
    page = _Page(text)
    assert [a for tag, a in page.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}, {}]
    data, library, own = page.scripts
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in (library, own)]
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    sources = " ".join(f"'sha256-{one}'" for one in hashes)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {sources}"
    folder = ROOT / "launch" / "report" / "page"
    assert library == (folder / "echarts.min.js").read_text()
    assert (folder / "echarts.LICENSE").read_text().lstrip().startswith("Apache License")
    assert not re.search(
        r"fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(|https?:", own.replace("http://www.w3.org/2000/svg", "")
    )
    assert len(library.encode()) <= 2**20
    assert len(text.encode()) <= 1.5 * 2**20
    rows = {row["label"]: row for row in json.loads(data)["rows"]}
    assert rows["adamwprune 70 %"]["runs"][2] == [2, "cells/resnet18_adamwprune_state_70_seed2/"]
    assert rows["adamwprune 70 %"]["settings"]["lr"]
    assert rows["adamwprune 70 %"]["top1"] == pytest.approx([99.1333, 0.1528], abs=1e-3)
    assert rows["adamwprune 70 %"]["memory"][0][0] == 11


def test_the_first_screen_is_three_sentences_one_figure_and_one_table(report):
    text = (report / "report.html").read_text()
    opening = text[text.index("<main>") : text.index("</main>")].split("<h2>")[1]
    assert opening.startswith("In a minute</h2>")
    order = [opening.index(mark) for mark in ("<li>", 'class="chart" id="pareto"', "<table>")]
    assert order == sorted(order)
    counts = {mark: opening.count(mark) for mark in ("<li>", "<figure>", "<table>")}
    assert counts == {"<li>": 3, "<figure>": 1, "<table>": 1}
    folded = re.findall("<details><summary><h2>(.*?)</h2></summary>", text)
    assert "Ranking" in folded
    assert "How it was measured" in folded
    assert text.count("<h2>") == len(folded) + 4
    assert opening.count("<tr>") - 1 == 2  # dense and 70 %


@pytest.mark.parametrize("study", ["demo", "digits"])
def test_what_is_kept_opens_with_few_rows_and_short_sentences(study):
    text = (RESULTS / study / "report.md").read_text()
    opening = text[text.index("## In a minute") : text.index("## Memory over training")]
    rows = [line for line in opening.splitlines() if line.startswith("| ")]
    assert 1 <= len(rows) - 2 <= 8
    assert sum(line.startswith("- **") for line in opening.splitlines()) == 3
    assert opening.index("](pareto.png)") < opening.index("| at |")
    order = [text.index(f"]({name}.png)") for name in ("pareto", "memory_timeline", "accuracy", "sparsity")]
    assert order == sorted(order)
    ours = text[: text.index("Data: ")] + text[text.index("Seeds: ") :]  # a data set's note is its maker's
    assert not [sentence for sentence in sentences(ours) if len(words(sentence)) > 25]


def test_a_long_study_shows_eight_sparsities_at_first(runs, tmp_path):
    groups = group_by_method(read_runs(runs)[0])
    many = {f"{name} {share}": members for share in range(9) for name, members in groups.items()}
    for share in range(9):
        for name in groups:
            metrics = {"target_sparsity": share / 10, "pruning": "state" if share else "none"}
            changed = [dataclasses.replace(run, metrics=run.metrics | metrics) for run in groups[name]]
            many[f"{name} {share}"] = changed
    lines = verdict_section(many, [])
    assert sum(line.startswith("| **") for line in lines) == 8
    assert "The ranking has 1 more sparsities." in lines


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine: apt-get install chromium")
def test_a_browser_shows_it_on_a_phone(report, tmp_path):
    picture = tmp_path / "phone.png"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=390,844",
        f"--screenshot={picture}",
        (report / "report.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    from PIL import Image

    with Image.open(picture) as shot:
        assert shot.size[0] >= 390
        colours = shot.convert("L").getcolors()
    assert colours is not None
    assert len(colours) > 20  # text and not an empty page


def test_one_run_alone_is_told_of_and_not_ranked(tmp_path):
    """As the README's own pictures come: one run, nothing beside it."""
    runs, _ = read_runs(RESULTS / "demo" / "runs.jsonl.xz")
    (run,) = [run for run in runs if run.label == "adamwprune budget auto 70 %"]
    write_report([run], tmp_path, tmp_path)
    text = (tmp_path / "report.md").read_text()
    opening = text[text.index("## In a minute") : text.index("## Memory over training")]
    assert f"ends at {run.metrics['final_top1']:.2f} % top-1 after {run.metrics['epochs']} epochs" in opening
    assert "**Zeros:** 70.0000 % of the prunable weights; asked for were 70 %." in opening
    assert f"{run.peak_bytes_per_weight:.2f} bytes a weight of state at the peak" in opening
    highest = max(phase["total_bytes"] for phase in run.memory["phases"].values())
    assert f"take {highest / 2**20:.2f} MiB on a rank" in opening
    assert "one seed, and nothing beside it" in opening
    for comparison in ("## Ranking", "pareto.png", "memory_vs_accuracy.png", "| take |", "luck"):
        assert comparison not in text
    assert "pareto" not in [path.stem for path in tmp_path.iterdir()]
    page = (tmp_path / "report.html").read_text()
    assert 'id="pareto"' not in page
    assert 'id="accuracy"' in page
    assert "<summary><h2>In a minute" not in page
    assert "<summary></summary>" not in page


def test_a_file_takes_the_tables_alone(runs, tmp_path):
    out = tmp_path / "rounds" / "tuning.md"
    assert main([str(runs), "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["tuning.md"]
    text = out.read_text()
    assert text.startswith("# tuning: resnet18 on digits")
    assert "## Ranking" in text
    assert "![" not in text


def test_a_brief_report_keeps_its_runs_too(runs, tmp_path, capsys):
    assert main([str(runs), "--out", str(tmp_path / "brief"), "--brief"]) == 0
    assert capsys.readouterr().err.endswith("brief/report.md\n")
    names = {path.name for path in (tmp_path / "brief").iterdir() if path.suffix != ".png"}
    assert names == {"report.md", "summary.json", "runs.jsonl.xz"}
    again = read_runs(tmp_path / "brief" / "runs.jsonl.xz")[0]
    assert [run.metrics for run in again] == [run.metrics for run in read_runs(runs)[0]]
