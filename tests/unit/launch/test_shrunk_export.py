"""What a run exports without its dead channels, and as files that need no code of ours."""

import json

import pytest
import torch
from flags import train_flags, vit_flags

import toolkit
import train
from launch.export import main
from launch.run_model import run_model
from launch.shrinking import export_shrunk
from toolkit.engine.checkpoint import load_checkpoint, newest_checkpoint


def trained(few_digits, output, flags=train_flags):
    """A short run of which whole channels end at zero."""
    assert (
        train.main([*flags(few_digits, output, "--opt", "adamwprune", "--sparsity", "0.9"), "--experiment", "r"]) == 0
    )
    return output / "r"


@pytest.fixture(scope="module")
def run(few_digits, tmp_path_factory):
    return trained(few_digits, tmp_path_factory.mktemp("runs"))


def model_of(run):
    checkpoint = newest_checkpoint(run / "checkpoints")
    return run_model(checkpoint, load_checkpoint(checkpoint)["model"])[0]


def test_a_shrunk_run_says_the_same_and_is_smaller(run, tmp_path, capsys):
    assert main([str(run), "--out", str(tmp_path / "s"), "--shrink", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert sum(gone for gone, _ in done["channels"].values()) > 0
    assert done["weights"][1] < done["weights"][0]
    assert done["flops"][1] < done["flops"][0]
    assert done["stored_bytes"] < done["dense_bytes"]
    assert done["difference"] <= 1e-5
    assert done["images"].startswith("40 images of ")  # the whole split
    whole, small = model_of(run), toolkit.load_shrunk(tmp_path / "s")
    images = torch.randn(3, 3, 32, 32)
    assert torch.allclose(whole(images), small(images), atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == done["weights"][1]
    assert main([str(run), "--out", str(tmp_path / "s"), "--shrink"]) == 0
    assert "channels removed, in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "shrunk"), [("onnx", True), pytest.param("pt2", True, marks=pytest.mark.long), ("pt2", False)]
)
def test_files_that_need_no_code_of_ours(run, tmp_path, kind, shrunk, capsys):
    out = tmp_path / "s" if shrunk else tmp_path / f"model.{kind}"
    assert main([str(run), "--out", str(out), "--format", kind, "--json", *["--shrink"] * shrunk]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["difference_of_format"] <= 1e-4
    file = out / f"model.{kind}" if shrunk else out
    assert done["file"] == str(file)
    assert file.stat().st_size < 1.3 * done["dense_bytes"] + 2**20  # no images within
    model = toolkit.load_shrunk(out) if shrunk else model_of(run)
    images = torch.randn(5, 3, 32, 32)
    if kind == "pt2":
        got = torch.export.load(file).module()(images)
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    assert torch.allclose(got, model(images), atol=1e-4)


def test_a_vit_without_its_data(few_digits, tmp_path, capsys):
    flags = vit_flags(few_digits, tmp_path, "--img-size", "160", "--epochs", "1", "--global-batch-size", "24")
    assert train.main([*flags, "--experiment", "r"]) == 0
    settings = (tmp_path / "r" / "args.yaml").read_text()
    (tmp_path / "r" / "args.yaml").write_text(settings.replace(str(few_digits), str(tmp_path / "gone")))
    capsys.readouterr()
    assert main([str(tmp_path / "r"), "--out", str(tmp_path / "s"), "--shrink"]) == 0
    out = capsys.readouterr().out
    assert "on 32 random images, for the run's data is not at hand (" in out
    assert "\n0 of " in f"\n{out}"  # a dense run has nothing to remove
    toolkit.load_shrunk(tmp_path / "s")


@pytest.mark.parametrize(
    ("flags", "more"),
    [(train_flags, ["--bn-eps", "1e-2"]), (vit_flags, ["--input-size", "1", "16", "32"])],
    ids=["epsilon of BatchNorm", "grey, not square"],
)
def test_what_timms_flags_make_of_a_model_is_in_its_plan(few_digits, tmp_path, flags, more):
    asked = [*flags(few_digits, tmp_path, "--epochs", "1", "--global-batch-size", "24"), *more]
    if "--input-size" in more:
        place = asked.index("--img-size")
        del asked[place : place + 2]
    assert train.main([*asked, "--experiment", "r"]) == 0
    assert main([str(tmp_path / "r"), "--out", str(tmp_path / "s"), "--shrink"]) == 0
    whole, small = model_of(tmp_path / "r"), toolkit.load_shrunk(tmp_path / "s")
    images = torch.randn(3, *((1, 16, 32) if "--input-size" in more else (3, 32, 32)))
    assert torch.allclose(whole(images), small(images), atol=1e-5)


def test_a_smaller_model_that_says_something_else_is_not_written(run, tmp_path, monkeypatch):
    def wrong(model, groups, images):
        smaller, plan, dead = original(model, groups, images)
        with torch.no_grad():
            smaller.fc.bias[0] += 1e-2
        return smaller, plan, dead

    from launch import shrinking

    original = shrinking.remove_dead_channels
    monkeypatch.setattr(shrinking, "remove_dead_channels", wrong)
    checkpoint = newest_checkpoint(run / "checkpoints")
    with pytest.raises(ValueError, match=r"is not written: the smaller model differs by .* of the output"):
        export_shrunk(checkpoint, load_checkpoint(checkpoint)["model"], tmp_path / "s", "safetensors")
    assert not (tmp_path / "s").exists()


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fails", ["smaller", "read back", "onnx", "pt2"])
@pytest.mark.parametrize("before", [True, pytest.param(False, marks=pytest.mark.long)])
def test_what_fails_a_check_leaves_what_was_there(run, tmp_path, monkeypatch, fails, before):
    from launch import formats, shrinking

    kind = fails if fails in formats.LIMITS else "safetensors"
    out = tmp_path / "s"
    if before:
        out.mkdir()
        for name in ("model.safetensors", "channels.json", "model.onnx", "model.pt2", "notes.txt"):
            (out / name).write_text(name)
    was = contents(tmp_path)
    calls = []

    def far(one, other):  # the second difference is that of what was read back
        calls.append(fails)
        return 1.0 if (len(calls) > 1) == (fails == "read back") else 0.0

    if kind == "safetensors":
        monkeypatch.setattr(shrinking, "difference", far)
    else:
        monkeypatch.setattr(formats, "difference", lambda one, other: 1.0)
    checkpoint = newest_checkpoint(run / "checkpoints")
    with pytest.raises(ValueError, match="is not written: ") as error:
        export_shrunk(checkpoint, load_checkpoint(checkpoint)["model"], out, kind)
    assert str(tmp_path / "s.") not in str(error.value)
    assert (", read back," in str(error.value)) == (fails == "read back")
    assert contents(tmp_path) == was
    assert sorted(tmp_path.iterdir()) == [out] * before


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_file_that_fails_its_check_leaves_the_one_before(run, tmp_path, monkeypatch, kind, capsys):
    from launch import formats

    monkeypatch.setattr(formats, "difference", lambda one, other: 1.0)
    (tmp_path / f"model.{kind}").write_text("good")
    line = error_of(capsys, main, [str(run), "--out", str(tmp_path / f"model.{kind}"), "--format", kind])
    assert f"model.{kind} is not written: it differs from the model by 1.0e+00 of its output" in line
    assert contents(tmp_path) == {f"model.{kind}": b"good"}


def test_a_second_export_replaces_the_first_and_leaves_the_rest(run, tmp_path):
    out = tmp_path / "s"
    out.mkdir()
    for name in ("model.safetensors", "channels.json", "notes.txt"):
        (out / name).write_text("old")
    assert main([str(run), "--out", str(out), "--shrink"]) == 0
    toolkit.load_shrunk(out)
    assert (out / "notes.txt").read_text() == "old"
    assert sorted(path.name for path in out.iterdir()) == ["channels.json", "model.safetensors", "notes.txt"]
    assert list(tmp_path.iterdir()) == [out]


def error_of(capsys, command, argv):
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(command(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_shrunk_model_is_taken_for_a_whole_one_nowhere(run, few_digits, tmp_path, capsys):
    assert main([str(run), "--out", str(tmp_path / "s"), "--shrink"]) == 0
    flags = train_flags(few_digits, tmp_path)
    for start in (tmp_path / "s", tmp_path / "s" / "model.safetensors"):
        line = error_of(capsys, train.main, [*flags, "--initial-checkpoint", str(start)])
        assert "is a shrunk model, not a whole one; load it with toolkit.load_shrunk" in line
    line = error_of(capsys, train.main, [*flags, "--experiment", "x", "--resume", str(tmp_path / "s")])
    assert "--resume" in line
    assert "is a shrunk model" in line
    line = error_of(capsys, main, [str(tmp_path / "s"), "--out", str(tmp_path / "t")])
    assert "is a shrunk model" in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--packed", "--shrink"], "choose one"),
        (["--packed", "--format", "onnx"], "leave it out with --format onnx"),
    ],
)
def test_flags_that_do_not_go_together(run, tmp_path, capsys, more, said):
    assert said in error_of(capsys, main, [str(run), "--out", str(tmp_path / "x"), *more])


def test_a_missing_library_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    line = error_of(capsys, main, [str(run), "--out", str(tmp_path / "x.onnx"), "--format", "onnx"])
    assert 'needs onnxscript, which is not installed; pip install "adamwprune-toolkit[export]"' in line
