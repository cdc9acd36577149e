"""Pictures of a report: the figures of its tables, one colour a method, nothing hidden."""

import copy
import dataclasses
from pathlib import Path

import numpy
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from launch.png import save_png
from launch.report.archive import read_runs
from launch.report.charts import chart_data
from launch.report.pictures import _pictures
from launch.report.pictures_study import accuracy_over_sparsity, as_lines, pareto
from launch.report.runs import group_by_method, top1

RESULTS = Path(__file__).parents[3] / "results"


def groups_of(study):
    return group_by_method(read_runs(RESULTS / study / "runs.jsonl.xz")[0])


def drawn(draw, lines):
    figure = Figure()
    draw(figure, lines)
    return figure.axes[0]


def points(axes):
    """label -> (x, y, colour) of what has error bars."""
    return {bars.get_label(): (*bars[0].get_xydata()[0], to_hex(bars[0].get_color())) for bars in axes.containers}


def test_of_many_methods_a_few_are_shown_with_all_seeds_in_their_colour():
    groups = groups_of("synthetic")
    lines = as_lines(groups)
    pictures = _pictures(lines)
    draw, few, _, caption = pictures["memory_vs_accuracy.png"]
    shown = points(drawn(draw, few))
    assert "mean over seeds" in caption
    assert 2 < len(shown) < len(groups)
    colours = {name: colour for name, (*_, colour) in points(drawn(pareto, lines)).items()}
    named = {text.get_text() for text in drawn(pareto, lines).texts}
    assert named == {line.group for line in lines if not line.grey}
    for line in few:
        _, accuracy, colour = shown[line.group]
        assert accuracy == top1(groups[line.group])[0]
        assert colour == colours[line.group]
        assert len(line.members) > 1
    assert len({colour for *_, colour in shown.values()}) == len(few)


def test_the_sparsity_shown_of_many_methods_is_one_in_colour():
    """Of these the two worst ran at 95 %, all others at 70 %."""
    runs, _ = read_runs(RESULTS / "digits" / "runs.jsonl.xz")
    others = [run for run in runs if not run.is_ours]
    low = group_by_method([run for run in others if run.sparsity == 0.95])
    worst = {low[name][0].name for name in sorted(low, key=lambda name: top1(low[name]))[:2]}
    chosen = [run for run in others if run.sparsity == (0.95 if run.name in worst else 0.7)]
    _, few, *_ = _pictures(as_lines(group_by_method(chosen)))["memory_vs_accuracy.png"]
    assert {line.sparsity for line in few} == {0.7}


def test_a_method_that_ran_at_one_easy_sparsity_does_not_push_out_those_that_ran_at_all():
    runs, _ = read_runs(RESULTS / "digits" / "runs.jsonl.xz")
    others = group_by_method([run for run in runs if not run.is_ours and run.sparsity])
    by_name = {}
    for members in others.values():
        by_name.setdefault(members[0].name, []).append(members)
    everywhere = [name for name, levels in by_name.items() if len(levels) == 3]
    assert len(everywhere) > 8  # more than there are colours
    once = everywhere[0]
    chosen = [
        run
        for name in everywhere
        for members in by_name[name]
        for run in members
        if name != once or run.sparsity == 0.7
    ]
    for run in chosen:
        if run.name == once:
            run.metrics["final_top1"] = 100.0
    lines = as_lines(group_by_method(chosen))
    assert {line.name for line in lines if not line.grey} <= set(everywhere[1:])
    assert sum(line.grey for line in lines if line.name == once) == 1


def test_the_front_ends_in_a_line_between_ticks():
    groups = groups_of("demo")
    smaller, larger = groups["adamwprune budget auto 70 %"][0], groups["adamwprune float32 70 %"][0]
    larger.metrics["final_top1"] = 100.0  # above what takes fewer bytes
    axes = drawn(pareto, as_lines(groups))
    xs, ys = next(line.get_data() for line in axes.lines if line.get_drawstyle() == "steps-post")
    best = max(top1(members)[0] for members in groups.values())
    least, most = axes.get_xlim()
    assert list(ys) == [smaller.metrics["final_top1"], best, best]
    assert list(xs) == [smaller.peak_bytes_per_weight, larger.peak_bytes_per_weight, most]
    assert [tick for tick in axes.get_xticks() if least <= tick <= most] == [2, 4, 8, 16]


def test_an_optimizer_without_state_has_a_place_on_the_logarithmic_axis():
    groups = groups_of("demo")
    (run,) = groups["momentum"]
    memory = copy.deepcopy(run.memory)
    for ledger in ("ledger", "ledger_peak"):
        memory[ledger]["optimizer_bytes"] = 0
    groups["momentum"] = [dataclasses.replace(run, memory=memory, timeline=[])]
    axes = drawn(pareto, as_lines(groups))
    least, _ = axes.get_xlim()
    assert least < points(axes)["momentum"][0] < 0.1
    (row,) = [row for row in chart_data(groups)["rows"] if row["label"] == "momentum"]
    assert (row["peak"], row["place"]) == (0.0, points(axes)["momentum"][0])


@pytest.mark.parametrize("level", [0.0, 0.7])
def test_equal_results_do_not_hide_each_other(level):
    groups = groups_of("demo")
    for run in (run for members in groups.values() for run in members):
        run.metrics["final_top1"] = 99.0
    lines = [line for line in as_lines(groups) if line.sparsity == level]
    places = [x for x, *_ in points(drawn(accuracy_over_sparsity, lines)).values()]
    assert len(set(places)) == len(places) > 1
    assert all(abs(x - 100 * level) < 2 for x in places)


def test_a_palette_of_256_colours_is_not_to_be_seen(tmp_path):
    study = _pictures(as_lines(groups_of("digits")))["accuracy.png"]
    figure = Figure(figsize=study[2], layout="constrained")
    study[0](figure, study[1])
    figure.savefig(tmp_path / "full.png", dpi=130)
    save_png(figure, tmp_path / "small.png")
    full, small = (Image.open(tmp_path / name) for name in ("full.png", "small.png"))
    assert small.mode == "P"
    assert small.size == full.size
    off = numpy.asarray(full.convert("RGB"), int) - numpy.asarray(small.convert("RGB"), int)
    assert abs(off).max() <= 16
    assert (tmp_path / "small.png").stat().st_size < 0.7 * (tmp_path / "full.png").stat().st_size
