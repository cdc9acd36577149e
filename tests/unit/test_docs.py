"""What README and docs say: short sentences, and only commands, flags, files, names and options that exist."""

import ast
import dataclasses
import importlib.util
import json
import re
import tomllib
from fractions import Fraction

import pytest
import torch
from docs_text import PAGES, ROOT, code, links, sentences, table_after, words

from toolkit.flag import flag_name
from toolkit.timm_flags import IDLE, NOT_OFFERED

README = ROOT / "README.md"
FOLDERS = ("toolkit", "launch", "shards", "tests", "accelerate_configs", "results", "docs", "examples")
FOREIGN = {  # flags of others' commands
    "accelerate launch": ("--config_file", "--num_processes", "--max_restarts"),
    "pip": ("--index-url",),
    "sbatch": ("--nodes",),
    "tensorboard": ("--logdir", "--host"),
    "timm's train.py": tuple(map(flag_name, IDLE | NOT_OFFERED)),
}


def page_id(path):
    return str(path.relative_to(ROOT))


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_sentences_are_short(page):
    long = [(len(words(sentence)), sentence) for sentence in sentences(page.read_text()) if len(words(sentence)) > 25]
    assert not long


def test_a_long_sentence_is_noticed():
    text = "word " * 26
    for shape in ("{}", "- {}", "> {}", "| a | {} |", "Short. {}", "a:\n{}\nb", "[{}](x)"):
        assert max(len(words(sentence)) for sentence in sentences(shape.format(text))) > 25, shape
    assert not [s for s in sentences(f"```\n{text}\n```\n`{text}`\n<!-- {text} -->") if len(words(s)) > 1]
    text = "# One\n\ntwo\nthree. Four: five!\n- [six](seven)\n- eight\n\n| nine. ten | eleven |\n| --- | --- |"
    assert sentences(text) == ["One", "two three.", "Four: five!", "six", "eight", "nine.", "ten", "eleven"]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    targets = [target.partition("#")[0] for target in links(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_modules_and_targets_exist(page):
    text = "\n".join(code(page.read_text()))
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    makefile = (ROOT / "Makefile").read_text()
    targets = {name for line in re.findall(r"^([\w.%/ -]+):(?!=)", makefile, re.M) for name in line.split()}
    for name in set(re.findall(r"(?:^|&& )make ([a-z-]+)", text, re.M)):
        known = name in targets or any(name.startswith(target[:-1]) for target in targets if target.endswith("%"))
        missing += [] if known else [f"make {name}"]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_named_exist(page):
    text = " ".join(code(page.read_text()))
    named = {name for name in re.findall(r"(?<![\w/.-])[\w.-]+(?:/[\w.<>*{}-]+)+", text) if "<" not in name}
    missing = [name for name in named if name.split("/")[0] in FOLDERS and not (ROOT / name).exists()]
    assert not missing


def known_flags():
    """Flags that a parser of ours declares: train.py's from its fields, the others' from their source."""
    from toolkit.config import flags

    found = {"--help", "--config"}
    for item in flags():
        name = item.name.replace("_", "-")
        found |= {f"--{name}", f"--no-{name}"}
    for folder in ("toolkit", "launch", "shards"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                    found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
                if isinstance(node, ast.Dict):  # of command_parser: a flag and what it is made with
                    made = [
                        key for key, value in zip(node.keys, node.values, strict=True) if isinstance(value, ast.Dict)
                    ]
                    found |= {key.value for key in made if isinstance(key, ast.Constant)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_flags_exist(page):
    text = " ".join(code(page.read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))
    assert not sorted(named - known_flags() - {flag for flags in FOREIGN.values() for flag in flags})


def test_extras_and_console_script_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = " ".join(line for page in PAGES for line in code(page.read_text()))
    extras = {name for group in re.findall(r"pip install '\.\[([\w,]+)\]'", text) for name in group.split(",")}
    assert extras
    assert extras <= project["optional-dependencies"].keys()
    assert "adamwprune-train" in text
    assert "adamwprune-train" in project["scripts"]


def read_study(name):
    return json.loads((ROOT / "results" / name).read_text())


def test_the_readme_holds_the_table_that_the_command_writes():
    from launch.readme import gpu_checks, with_table

    text = README.read_text()
    studies = [read_study(f"{name}/summary.json") for name in ("cifar10", "imagenette")]
    assert with_table(text, studies, read_study("bench/optim.json"), gpu_checks()) == text


def test_the_table_follows_the_figures():
    from launch.readme import with_table

    study, bench = read_study("cifar10/summary.json"), read_study("bench/optim.json")
    studies = [study, read_study("imagenette/summary.json")]
    (machine,) = bench["machines"] = bench["machines"][:1]
    for cell in study["cells"]:
        if cell["name"].startswith("resnet10t_adamwprune_state_70_"):
            cell["final_top1"] = 50.0 + cell["seed"]
            cell |= {"optimizer_bytes_per_weight": 3.0, "optimizer_end_bytes": 300, "optimizer_peak_bytes": 500}
    next(row for row in machine["rows"] if row["name"] == "adamwprune 70%")["ratio_to_peer"] = 0.12
    text = with_table(README.read_text(), studies, bench)
    assert "| `adamwprune` | 70 % | 5.00 | 3.00 | 0.12 | 52.0 ± 1.6 |" in text
    row = {"name": "adamwprune 70%", "peer": "torch AdamW fused", "ratio_to_peer": 0.62}
    times = {"schema": "bench-device/1", "model": machine["model"], "kind": "cuda", "device": "A card", "rows": [row]}
    fused = {"name": "torch AdamW fused", "peer": None, "ratio_to_peer": None}
    sgd = [{"name": f"sgdprune {share}%", "peer": "torch SGD fused", "ratio_to_peer": 0.75} for share in (70, 90)]
    others = [fused, {**fused, "name": "torch SGD fused"}, {**row, "name": "adamwprune 90%"}, *sgd]
    parts = {"a": {"result": {**times, "rows": [row, *others]}}, "b": {"result": None}, "c": {"result": {"x": 1}}}
    text = with_table(README.read_text(), studies, bench, [{"parts": parts}])
    assert re.search(r"\| 0\.12 \| 52\.0 ± 1\.6 \| [\d.]+ ± [\d.]+ \| 0\.62 \|", text)
    assert "On a GPU: A card, device time." in text
    with pytest.raises(ValueError, match=r"put them where the table goes"):
        with_table("no marks", studies, bench)
    with pytest.raises(ValueError, match=r"no run of adamw_none; run the study again"):
        with_table(text, [{**study, "cells": []}, studies[1]], bench)
    with pytest.raises(ValueError, match=r"no row 'torch AdamW fused'; run launch.bench optim again"):
        with_table(text, studies, {"machines": [{**machine, "rows": []}]})


def test_the_readmes_loop_prunes_as_it_says():
    """Its own lines, with fewer steps and a smaller model."""
    [block] = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    for long, short in {'"resnet18"': '"test_resnet"', "begin_step=500": "begin_step=1", "6_000": "6"}.items():
        assert long in block
        block = block.replace(long, short)
    torch.manual_seed(0)
    names = {"loader": [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(7)]}
    exec(block, names)
    assert names["zeros"] == Fraction("0.7") * names["weights"] // 1
    assert names["weights"] > 10_000


def refuses(monkeypatch, engine, arguments):
    """Whether train.py refuses these flags under ddp, fsdp2 or deepspeed, as soon as it knows the engine."""
    from toolkit.builder.accelerator import check_engine
    from toolkit.cli import parse

    for name, asked in (("FSDP", "fsdp2"), ("DEEPSPEED", "deepspeed")):
        monkeypatch.setenv(f"ACCELERATE_USE_{name}", str(engine == asked).lower())
    try:
        check_engine(parse(["--data-dir", "x", *arguments]))
    except ValueError:
        return True
    return False


def test_the_readmes_engines_are_what_train_py_takes(monkeypatch):
    """Each "no" of FSDP2 and ZeRO is refused, each "yes" and every kind of precision is not."""
    lines = README.read_text().split("## What goes with what\n\n")[1].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    flags = {
        "EMA": ["--model-ema"],
        "compile": ["--torchcompile"],
        "SyncBN": ["--sync-bn"],
        "fused backward": ["--fused-backward"],
        "resume elsewhere": ["--resume", "auto"],
    }
    assert header[2:] == list(flags)
    engines = {"one process": "ddp", "DDP": "ddp", "FSDP2": "fsdp2", "ZeRO-1, 2, 3": "deepspeed"}
    assert [row[0] for row in rows] == list(engines)
    for label, amp, *cells in rows:
        engine = engines[label]
        for name, cell in zip(header[2:], cells, strict=True):
            if engine != "ddp" or cell == "yes":
                assert refuses(monkeypatch, engine, flags[name]) == (cell == "no"), (label, name)
        for precision in ("bf16", "fp16"):
            assert refuses(monkeypatch, engine, ["--amp", precision]) == (precision not in amp), (label, precision)


def test_the_engines_page_says_what_train_py_takes(monkeypatch, tmp_path):
    """Each "no" of its table is refused at start, and nothing else is; rows without a flag are other tests'."""
    pruned = ["--opt", "adamwprune", "--sparsity", "0.5"]
    (tmp_path / "rules.yaml").write_text("fc: skip")
    flags = {
        "`--prune-config`": [*pruned, "--prune-config", str(tmp_path / "rules.yaml")],
        "`--layer-decay`": ["--layer-decay", "0.7"],
        "`--clip-grad` by norm": ["--clip-grad", "1"],
        "`--clip-mode value`, `agc`": ["--clip-grad", "1", "--clip-mode", "agc"],
        "`--model-ema`": ["--model-ema"],
        "`--amp bf16`, `fp16`": ["--amp", "bf16"],
        "`--model-dtype bfloat16`": ["--model-dtype", "bfloat16"],
        "`--torchcompile`": ["--torchcompile"],
        "`--sync-bn`": ["--sync-bn"],
        "`--prune-scope layer`, `erk`": [*pruned, "--prune-scope", "layer"],
        "`--prune-pattern` 2:4, channel": [*pruned, "--prune-pattern", "2:4"],
        "`--prune-shrink`": [*pruned, "--prune-pattern", "channel", "--prune-shrink"],
        "`--channels-last`": ["--channels-last"],
        "`--kd-model-name`": ["--kd-model-name", "test_vit"],
        "`--fused-backward`": ["--fused-backward"],
    }
    lines = (ROOT / "docs" / "engines.md").read_text().split("## Feature × engine\n\n")[1].split("\n\n")[0].splitlines()
    rows = {cells[0]: cells[1:4] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    assert {name for name in rows if name.startswith("`")} == flags.keys()
    for name, arguments in flags.items():
        for engine, cell in zip(("ddp", "fsdp2", "deepspeed"), rows[name], strict=True):
            if engine != "ddp" or not cell.startswith("no"):  # DDP on one rank refuses nothing
                assert refuses(monkeypatch, engine, arguments) == cell.startswith("no"), (name, engine)
    (tmp_path / "rules.yaml").write_text("fc: 0.9")
    for name in ("`--prune-config`", "`--layer-decay`"):  # ZeRO's "one part only", "not with pruning"
        assert refuses(monkeypatch, "deepspeed", [*pruned, *flags[name]])
        assert not refuses(monkeypatch, "fsdp2", [*pruned, *flags[name]])


OPTIMIZERS = (ROOT / "docs" / "optimizers.md").read_text()


def test_the_options_table_has_every_option_and_its_default():
    from toolkit.prune.options import PruningOptions

    rows = table_after(OPTIMIZERS, "options")
    fields = dataclasses.fields(PruningOptions)
    assert [(row[0], row[1]) for row in rows] == [(f"`{field.name}`", f"`{field.default!r}`") for field in fields]


def test_the_names_table_has_every_name_once():
    from toolkit.optim.registry import specs

    named = [name for row in table_after(OPTIMIZERS, "names") for name in re.findall(r"`([^`]+)`", row[0])]
    assert sorted(named) == sorted(spec.name for spec in specs())


def test_the_scores_table_has_every_score_and_who_offers_it():
    from toolkit.optim import AdamWPrune, AdamWSPAM, SGDPrune
    from toolkit.prune.hooks import HOOK_METHODS
    from toolkit.prune.scores import STATE_SCORES

    rows = {row[0].strip("`"): row[2] for row in table_after(OPTIMIZERS, "scores")}
    assert list(rows) == [*(name for name in AdamWPrune.SCORES if name in STATE_SCORES), *HOOK_METHODS["movement"]]
    assert AdamWPrune.SCORES == AdamWSPAM.SCORES
    for name, offered in rows.items():
        assert ("by state" in offered) == (name in AdamWPrune.SCORES), name
        assert ("all by state" in offered) == (name in SGDPrune.SCORES), name
        assert ("movement" in offered) == (name in HOOK_METHODS["movement"]), name
    firsts = {AdamWPrune.SCORES[0]: "its default", SGDPrune.SCORES[0]: "`sgdprune`'s default"}
    assert all(said in rows[name] for name, said in firsts.items())
