"""Run folders whose names, notes and settings are markup: the report shows them as text, and opens nothing else."""

import html
import html.parser
import json
import re
import shutil
from base64 import b64encode
from hashlib import sha256
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.report.__main__ import main
from launch.report.archive import read_runs
from launch.report.charts import as_json
from launch.report.html import as_code, as_text, to_html

ROOT = Path(__file__).parents[3]
RUNS = ROOT / "results" / "demo" / "runs.jsonl.xz"
SOURCES = ROOT / "launch" / "report" / "page"
SCRIPT = "<script>alert(1)</script>"
MARKUP = " ".join(
    [
        SCRIPT,
        "</title></h1>" + SCRIPT,
        "<img src=x onerror=alert(1)>",
        "[x](javascript:alert(1)) [x](java&#115;cript:alert(1)) <javascript:alert(1)>",
        "![x](http://127.0.0.1:9/pixel.png)",
        'x" onmouseover="alert(1)',
        "a | b | c `a` ``b`` **c** _d_ ~~e~~ $f$ \\| &lt;script&gt;",
        "\x1b]0;title\x07\u202e",
    ]
)
LINES = (
    "![x](../../secret.png)\n\n*caption*\n\n[x]: javascript:a\n\n## H\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\n"
    + SCRIPT
)


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its tags and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts.append(data)
        else:
            self.text += data


def assert_harmless(page, charts=0):
    """Nothing runs or loads but, where there are charts, our two scripts by their hashes."""
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "nav",
        "div",
        "ul",
        "li",
        "a",
        "p",
        "em",
        "strong",
    }
    allowed |= {"h1", "h2", "h3", "table", "thead", "tbody", "tr", "th", "td", "blockquote", "code"}
    allowed |= {"details", "summary"}
    allowed |= {"figure", "figcaption", "script", "noscript"} if charts else set()
    assert {tag for tag, _ in page.tags} <= set(allowed)
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        link = attributes.get("href", "#")
        assert link.startswith(("#", "cells/", "http://", "https://")), link
    assert [tag for tag, _ in page.tags].count("figure") == charts
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    if not charts:
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
        return
    data, *scripts = (script for script in page.scripts if script.strip())
    assert [a for tag, a in page.tags if tag == "script"] == [{"type": "application/json", "id": "data"}, {}, {}]
    assert scripts == [(SOURCES / name).read_text() for name in ("echarts.min.js", "page.js")]
    hashes = " ".join(f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts)
    assert policy == [f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}"]
    assert not set("<>&") & set(data)
    for row in json.loads(data)["rows"]:
        assert all(re.fullmatch(r"cells/[\w.~%-]+/", href) for _, href in row["runs"])


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    assert main([str(RUNS), "--unpack", str(tmp_path / "cells")]) == 0
    for name in ("resnet18_adamw_none_seed0", "resnet18_adamwprune_state_70_seed0"):
        cell = shutil.copytree(tmp_path / "cells" / name, folder / name)
        (cell / "memory_timeline.csv").write_text(
            "rank,step,phase,ledger_bytes,optimizer_bytes,alloc_retries\n0,11,dense,1000,500,\n0,22,final,800,300,\n"
        )
        change(cell, "metrics.json", {"steps_per_epoch": 22})
    return folder


def change(cell, name, values):
    read, write = (yaml.safe_load, yaml.safe_dump) if name.endswith("yaml") else (json.loads, json.dumps)
    (cell / name).write_text(write(read((cell / name).read_text()) | values))


@pytest.mark.filterwarnings("error:Glyph")  # one would bring the letter itself to the terminal
@pytest.mark.parametrize("attack", [MARKUP, LINES], ids=["markup", "lines"])
def test_text_of_run_folders_is_shown_as_text(runs, tmp_path, attack, capsys):
    (tmp_path / "secret.png").write_bytes(b"secret")
    first, second = sorted(runs.iterdir())
    for cell in (first, second):
        texts = ("dataset", "dataset_note", "model", "device", "mixed_precision")
        change(cell, "metrics.json", dict.fromkeys(texts, attack) | {"versions": {attack: attack}})
        change(cell, "args.yaml", {"val_split": attack})
    change(second, "metrics.json", {"opt": attack})
    change(second, "args.yaml", {"sched": attack})
    memory = json.loads((second / "memory.json").read_text())
    memory["ledger"]["rows"][-1] |= {"name": attack, "measured_bytes": 7}
    memory["phases"] = {attack: next(iter(memory["phases"].values()))}
    (second / "memory.json").write_text(json.dumps(memory))
    second.rename(runs / attack.replace("/", "-")[:200])
    (runs / "command.txt").write_text(attack)
    out = tmp_path / "study"
    assert main([str(runs), "--out", str(out)]) == 0
    page = Page((out / "report.html").read_text())
    assert_harmless(page, charts=4)
    shown, line = page.text.replace("\n", " "), repr(attack)[1:-1].replace("\\\\", "\\")
    assert shown.count(line) >= 15
    for place in ("Data: {}.", "its split {}.", "ranks on {}.", "Versions: {0} {0}.", "precision {}.", "Runs: {}."):
        assert place.format(line) in shown
    text = (out / "report.md").read_text()
    assert "<script" not in re.sub(r"(?s)(`+).*?\1(?!`)", "", text)  # as code it may stand there
    tables = re.findall(r"(?m)(?:^\|.*\n)+", text)
    assert all(len({row.count("|") for row in table.splitlines()}) == 1 for table in tables)
    assert "\x1b" not in "".join(capsys.readouterr())


HOSTILE_PAGE = f"""# Title {SCRIPT} "q"

{SCRIPT} text <b onclick="x()">b</b>

<iframe src="https://example.org"></iframe>

<div>

[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](java&#115;cript:alert(1)) [d](data:text/html;base64,x)
[e](vbscript:x) [f]( javascript:alert(1)) <javascript:alert(1)> [g](&#x6A;avascript&#58;alert(1)) [h]

[h]: javascript:alert(1)

![p](../secret.png)

*caption*

![q](https://example.org/pixel.png) [fine](https://example.org/a?b=c&d) [near](cells/a/args.yaml)

## Part
"""


def test_the_page_lets_nothing_through_whatever_the_markdown(tmp_path):
    text = to_html(HOSTILE_PAGE, {})
    page = Page(re.sub('<img alt="[^"]*" ?/>', "", text))  # a picture without a source is none
    assert_harmless(page)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a" and "href" in attributes]
    assert links == ["https://example.org/a?b=c&d", "cells/a/args.yaml"]
    assert f"<title>Title {html.escape(SCRIPT)} " in text


def test_captions_and_alternative_texts_are_text():
    markdown = f"# T\n\n![x](a.png)\n\n*{as_text(SCRIPT)}*\n\n## Part\n"
    page = Page(to_html(markdown, {"a.png": f'"><{SCRIPT} onerror="x'}, as_json({"rows": [], "name": SCRIPT})))
    assert_harmless(page, charts=1)
    (chart,) = [attributes for _, attributes in page.tags if attributes.get("class") == "chart"]
    assert chart == {"class": "chart", "id": "a", "role": "img", "aria-label": f'"><{SCRIPT} onerror="x'}
    assert SCRIPT in page.text


PIECES = st.sampled_from([*"<>[]()!*_`|#\\&;:~$\n\t ax1/", "](", "javascript:", "&#", "<a "])


@settings(max_examples=100, deadline=None)
@given(st.lists(PIECES, max_size=25).map("".join))
def test_any_text_is_shown_as_it_is(text):
    """In a paragraph, a cell and as code."""
    said = as_text("." + text)
    table = f"| a | b |\n| --- | --- |\n| {said} | x |"
    page = Page(to_html(f"# T\n\n{said}\n\n{table}\n\nRuns: {as_code('.' + text)}.\n\n## P\n", {}))
    assert_harmless(page)
    shown = "." + text.replace("\n", "\\n").replace("\t", "\\t")
    assert [part.strip() for part in page.text.split("\n")].count(shown.strip()) == 2
    assert f"Runs: {shown.strip()}." in page.text or f"Runs: {shown}." in page.text
    assert [tag for tag, _ in page.tags].count("td") == 2


@pytest.mark.parametrize("name", ["metrics.json", "memory.json", "args.yaml", "summary.csv", "memory_timeline.csv"])
def test_files_of_a_run_folder_are_no_links_out(runs, tmp_path, name, capsys):
    """The report copies them: a link would publish any file that the reader may read."""
    path = runs / "resnet18_adamw_none_seed0" / name
    path.rename(tmp_path / "secret")
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(SystemExit) as caught:
        main([str(runs), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "leads out of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_that_stand_for_more_than_memory_holds_are_refused(runs):
    cell = runs / "resnet18_adamw_none_seed0"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    for text in (
        "\n".join(lines),
        "[" * 50_000,
        "- a",
        "a: !!python/object/apply:os.mkdir [ran]",
        " " * 2**24 + "a: 1",
    ):
        (cell / "args.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"args\.yaml (cannot be read|is no mapping of settings)"):
            read_runs(runs)
