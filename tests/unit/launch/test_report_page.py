"""What a report opens with, as text and as the HTML page: no network, own scripts, few rows, one run alone."""

import base64
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
from docs_text import sentences, words

from launch.report.archive import read_runs
from launch.report.report import write_report
from launch.report.runs import group_by_method
from launch.report.verdict import verdict_section

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "results"


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
    assert re.search(r"<strong>Cost:</strong> .* All tensors of a step: [\d.]+ MiB; dense [\d.]+", opening)


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


@pytest.mark.parametrize("study", ["cifar10", "demo", "digits", "imagenette"])
def test_our_own_words_in_the_names_of_rows_are_explained(study):
    text = (RESULTS / study / "report.md").read_text()
    ranking, explained = (text[text.index(title) :] for title in ("## Ranking", "## What the names mean"))
    names = re.findall(r"^\| ([a-z][^|]*) \|", ranking[: ranking.index("\n## ", 1)], re.MULTILINE)
    own = {word for name in names for word in re.findall(r"prune_\w+|\w+prune\b|budget auto|\+ \w+", name)}
    assert own
    assert not [word for word in own if f"| `{word.removeprefix('+ ')}" not in explained]


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
