"""Dense, pruned and shrunk models side by side: what is counted, what is timed, what is said."""

import json

import pytest
import timm
import torch
from flags import train_flags

import train
from launch.bench.__main__ import main
from launch.bench.inference import BARS, _bars, _prepared, to_markdown
from launch.bench.pruned import kept_channels, random_family, run_family, two_of_four
from toolkit.prune.channels import channel_groups


def test_the_rows_of_a_model():
    rows = {one.name: one.facts for one in random_family("test_resnet").candidates}
    assert list(rows) == [
        "dense",
        *(f"weight {n}%" for n in (70, 90, 95)),
        "2:4",
        *(f"channel {n}%" for n in (30, 50, 70)),
    ]
    dense = rows["dense"]
    for name in ("weight 70%", "weight 90%", "weight 95%", "2:4"):  # as many weights, as much work, a smaller file
        assert (rows[name]["weights"], rows[name]["flops"]) == (dense["weights"], dense["flops"])
        assert rows[name]["packed_bytes"] < rows[name]["dense_bytes"]
        assert rows[name]["zip_bytes"] < 0.9 * dense["zip_bytes"]
    for name in ("channel 30%", "channel 50%", "channel 70%"):
        assert rows[name]["weights"] < dense["weights"]
        assert rows[name]["flops"] < dense["flops"]
        assert rows[name]["dense_bytes"] < dense["dense_bytes"]
    assert rows["weight 90%"]["not_zero"] < 0.15 * dense["not_zero"]


@pytest.mark.parametrize("shape", [(6, 8), (5, 12, 3, 3)])
def test_two_of_each_four_along_the_input(shape):
    weight = torch.randn(shape)
    before = weight.clone()
    two_of_four(weight)
    fours, whole = (one.movedim(1, -1).reshape(-1, 4) for one in (weight, before))
    assert torch.equal(fours.ne(0).sum(1), torch.full((len(fours),), 2))
    assert torch.equal(fours[fours != 0], whole[fours != 0])
    assert bool((fours.abs().amax(1) == whole.abs().amax(1)).all())
    odd = torch.randn(4, 3)
    two_of_four(odd)
    assert odd.all()


def test_a_share_of_each_width():
    groups = channel_groups(timm.create_model("resnet18"), torch.zeros(1, 3, 32, 32))
    for share, wanted in ((0.5, {64: 32, 128: 64, 256: 128, 512: 256}), (0.7, {64: 19, 128: 38, 256: 77, 512: 154})):
        kept = kept_channels(groups, share)
        assert all(len(kept[group.name]) == wanted[group.count] for group in groups)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_widths_to_the_nearest_multiple(share):
    for name, size in (("resnet50", 64), ("vit_tiny_patch16_224", 224)):
        groups = channel_groups(timm.create_model(name), torch.zeros(1, 3, size, size))
        plain, rounded = (kept_channels(groups, share, multiple) for multiple in (1, 16))
        for group in groups:
            rows = min(one.places.shape[1] for one in group.slices)
            before, after = len(plain[group.name]), len(rounded[group.name])
            assert after * rows % 16 == 0
            assert abs(after - before) * rows <= 8 or after * rows == 16
            assert before == after or rows == 1  # heads of 64 rows are whole blocks


def test_rows_of_multiples_say_what_they_kept():
    rows = {one.name: one.facts for one in random_family("test_resnet", 16).candidates}
    assert rows["channel 70%"]["widths"] == [[16, 5], [32, 10], [48, 14], [96, 29]]
    rounded = rows["channel 70% by 16"]
    assert rounded["widths"] == [[16, 16], [32, 16], [48, 16], [96, 32]]
    assert rounded["weights"] > rows["channel 70%"]["weights"]
    assert [name for name in rows if " by " in name] == [f"channel {n}% by 16" for n in (30, 50, 70)]


def test_a_model_no_channel_of_which_can_go_has_the_other_rows(monkeypatch):
    monkeypatch.setattr("launch.bench.pruned.channel_groups", lambda model, images: [])
    assert [one.pattern for one in random_family("test_resnet", 16).candidates][-2:] == ["weight", "N:M"]


def test_the_bar_of_a_share_is_asked_of_its_multiples_too_by_their_own_name():
    name = "channel 70% by 16"
    row = {"name": name, "times": {"eager": {"32": {"times_dense": 1.8}}}, "flop_bound": 4.06}
    (bar,) = _bars({"name": "resnet50", "rows": [row]}, 32)
    assert (bar["row"], bar["bar"], bar["met"]) == (name, 1.9, False)


@pytest.fixture(scope="module")
def run(few_digits, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    flags = train_flags(few_digits, output, "--opt", "adamwprune", "--sparsity", "0.9")
    assert train.main([*flags, "--experiment", "r"]) == 0
    return output / "r"


def test_a_measurement(run, tmp_path, capsys):
    flags = ["--rounds", "2", "--batches", "2", "1", "--engines", "eager", "--threads", "1"]
    assert main(["inference", str(run), "--models", "--json", "--out", str(tmp_path), *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    (family,) = result["families"]
    whole, small = family["rows"]
    wanted = json.loads((run / "metrics.json").read_text())["final_top1"]
    assert whole["top1"] == pytest.approx(wanted)
    assert small["top1"] == pytest.approx(wanted)
    assert small["weights"] < whole["weights"]
    assert whole["peak_bytes"] > whole["weights"] * 4
    for row in family["rows"]:
        assert row["times"].keys() == {"eager"}
        for times in row["times"].values():
            assert times.keys() == {"1", "2"}
            assert all(0 < one["p50_ms"] <= one["p95_ms"] and one["images_per_s"] > 0 for one in times.values())
    assert [time["times_dense"] for time in whole["times"]["eager"].values()] == [1.0, 1.0]
    text = (tmp_path / "inference.md").read_text()
    assert text.startswith("# Inference")
    assert f"| as trained | {wanted:.2f} |" in text
    assert "No GPU was at hand" in text or result["kind"] == "cuda"
    shown = {"name": "resnet50", "pattern": "channel", "times": whole["times"], "flop_bound": 2.2}
    zeros = {**whole, "name": "weight 95%", "pattern": "weight"}
    bars = [
        {"model": model, "row": row, "batch": 2, "bar": bar, "times_dense": 1.5, "flop_bound": 2.2, "met": bar <= 1.5}
        for (model, row), bar in BARS.items()
    ]
    family["rows"] = [whole, zeros, {**whole, **shown}]
    text = to_markdown({**result, "bars": bars}, "x")
    said = "scattered zeros give no speed (weight 95% 1.00 × dense), for every zero is multiplied; removed channels: "
    assert f"{said}resnet50 1.00 ×." in text
    assert "| resnet50, channel 50%, batch 2, eager | 1.35 × | 1.50 × | 2.20 × | yes |" in text
    assert "| resnet50, channel 70%, batch 2, eager | 1.90 × | 1.50 × | 2.20 × | **no** |" in text


def test_a_run_without_dead_channels_is_one_row(few_digits, tmp_path):
    channel = ("--prune-pattern", "channel", "--prune-scope", "layer", "--sparsity", "0.5", "--prune-shrink")
    flags = train_flags(few_digits, tmp_path, "--opt", "adamwprune", *channel)
    assert train.main([*flags, "--experiment", "r"]) == 0
    (row,) = run_family(tmp_path / "r").candidates
    assert row.name == "as trained (--prune-shrink)"
    whole = sum(p.numel() for p in timm.create_model("test_resnet", num_classes=10).parameters())
    assert row.facts["weights"] < whole
    assert row.facts["not_zero"] == row.facts["weights"]
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert row.facts["top1"] == pytest.approx(metrics["final_top1"])


def test_onnx_runtime_runs_the_model(tmp_path):
    model, images = torch.nn.Linear(4, 2).eval(), torch.randn(3, 4)
    with torch.inference_mode():
        (found,) = _prepared("onnx", model, images, tmp_path, 1)(images)
        assert torch.allclose(torch.from_numpy(found), model(images), atol=1e-6)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["inference", "--engines", "tensorrt", "--models", "test_resnet"], "--engines tensorrt is not known"),
        (["inference", "--batches", "0", "--models", "test_resnet"], "must be 1 or more"),
        (["optim", "runs/x"], "optim takes no run folders"),
    ],
)
def test_mistakes_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_training_step_without_channels(capsys, tmp_path):
    assert main(["shrunk", "--model", "test_resnet", "--rounds", "1", "--batch-size", "2", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "shrunk.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "channel 30%", "channel 50%", "channel 70%"]
    for less, more in (("channel 30%", "dense"), ("channel 50%", "channel 30%"), ("channel 70%", "channel 50%")):
        assert rows[less]["weights"] < rows[more]["weights"]
        assert rows[less]["activation_bytes"] < rows[more]["activation_bytes"]
    assert "| channel 50% |" in (tmp_path / "shrunk.md").read_text()
