"""Checkpoints and weights from elsewhere: no code, no file outside, no more memory than they have bytes."""

import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from launch.export import main
from launch.packing import load_packed
from toolkit.builder.model import create_model
from toolkit.cli import parse
from toolkit.dist import World
from toolkit.engine.checkpoint import (
    best_checkpoint,
    complete_checkpoints,
    damage_of,
    load_checkpoint,
    newest_checkpoint,
    read_identity,
    save_checkpoint,
)
from toolkit.files import UnsafeNameError


@pytest.fixture
def checkpoint(tmp_path):
    state = {"model": {}, "ema": None, "optimizer": {"state": {}}}
    folder, tensors = tmp_path / "run" / "checkpoints", {"model.w": torch.arange(6.0).view(2, 3)}
    save_checkpoint(folder, state, 10, world=World(), history=2, tensors=tensors.items(), identity={"seed": 1})
    return newest_checkpoint(folder)


def change_mark(checkpoint, change):
    mark = json.loads((checkpoint / "COMPLETE").read_text())
    change(mark)
    (checkpoint / "COMPLETE").write_text(json.dumps(mark))


@pytest.mark.parametrize("name", ["/dev/zero", "../../../precious", "a/../../x", "", "a\nb", "-x"])
def test_a_file_list_that_leads_out_is_an_error_that_shows_the_name(checkpoint, name):
    """/dev/zero would be read for ever."""
    change_mark(checkpoint, lambda mark: mark["files"].update({name: 0}))
    assert repr(name) in damage_of(checkpoint)
    for read in (read_identity, load_checkpoint):
        with pytest.raises(UnsafeNameError) as caught:
            read(checkpoint)
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["state.pt", "tensors/rank00000-00000.safetensors"])
def test_a_checkpoints_files_are_no_links_out_and_no_devices(checkpoint, tmp_path, name):
    (checkpoint / name).rename(tmp_path / "elsewhere")
    (checkpoint / name).symlink_to(tmp_path / "elsewhere")
    assert "leads out of" in damage_of(checkpoint)
    with pytest.raises(UnsafeNameError, match=r"leads out of .* by a link"):
        load_checkpoint(checkpoint)
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)  # to open one waits for ever
    assert damage_of(checkpoint) == f"{name} is not as it was written"


@pytest.mark.parametrize("mark", [[], 7, {"identity": [1]}, {"identity": {}, "files": ["a"]}])
def test_a_mark_of_another_shape_is_an_error(checkpoint, mark):
    (checkpoint / "COMPLETE").write_text(json.dumps(mark))
    assert damage_of(checkpoint).startswith("ValueError")
    with pytest.raises(ValueError, match="is not the mark of a checkpoint"):
        read_identity(checkpoint)


class Code:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_code_in_a_checkpoint_does_not_run(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Code()}, checkpoint / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt holds more than plain values \(weights_only refuses it\)"):
        load_checkpoint(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_code_in_weights_to_start_from_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Code()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"--initial-checkpoint .* does not fit resnet18: .*[Ww]eights.only"):
        create_model(parse(["--model", "resnet18", "--initial-checkpoint", str(tmp_path / "w.pth")]), 10)
    assert not (tmp_path / "ran").exists()


def test_a_compressed_state_is_refused(checkpoint):
    """100 MB of zeros are 100 kB compressed, and so on."""
    with zipfile.ZipFile(checkpoint / "state.pt") as parts:
        content = {part.filename: parts.read(part) for part in parts.infolist()}
    with zipfile.ZipFile(checkpoint / "state.pt", "w", zipfile.ZIP_DEFLATED) as parts:
        for name, data in content.items():
            parts.writestr(name, data)
    with pytest.raises(ValueError, match="is compressed, as no checkpoint of this toolkit is"):
        load_checkpoint(checkpoint)


def test_tensors_that_claim_more_than_their_files_hold_are_refused(checkpoint):
    """A file of a tensor's part says where in the whole it lies, and so how large that is."""
    file = next((checkpoint / "tensors").glob("*.safetensors"))
    where = {"DCP_SHARDING_INFO": json.dumps({"model.w": {"saved_offsets": [2**40, 0]}})}
    save_file({"model.w": torch.zeros(2, 3)}, file, where)
    with pytest.raises(ValueError, match=r"claims 13,194,139,533,336 bytes of tensors in files of \d+;"):
        load_checkpoint(checkpoint)


def test_folders_that_are_only_like_a_checkpoint_are_none(checkpoint):
    for name in ("step-", "step-x", "step--5", "step-1e3", "step-\u0661"):
        (checkpoint.parent / name).mkdir()
        (checkpoint.parent / name / "COMPLETE").write_text("{}")
    assert complete_checkpoints(checkpoint.parent) == [checkpoint]


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "", None, ["a"]])
def test_the_best_checkpoint_is_one_of_the_run(checkpoint, name, tmp_path, capsys):
    (checkpoint.parent / "best.json").write_text(json.dumps({"checkpoint": name}))
    with pytest.raises(UnsafeNameError):
        best_checkpoint(checkpoint.parent)
    with pytest.raises(SystemExit):
        main([str(checkpoint.parents[1]), "--out", str(tmp_path / "out"), "--which", "best"])
    assert "is not a plain name" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"w.shape": torch.tensor([2**40, 2**20])},
        {"w.shape": torch.tensor([-8, -2])},
        {"w.shape": torch.tensor([4.0, 4.0])},
        {"w.shape": None},
        {"w.mask": torch.zeros(3, dtype=torch.uint8)},
        {"w.mask": torch.zeros(2, dtype=torch.int32)},
        {"w.values": torch.ones(3)},
        {"w.values": torch.ones(2, dtype=torch.float64)},
    ],
)
def test_a_packed_export_whose_parts_do_not_go_together_is_an_error(tmp_path, change):
    good = {
        "w.mask": torch.tensor([3, 0], dtype=torch.uint8),
        "w.values": torch.ones(2),
        "w.shape": torch.tensor([4, 4]),
    }
    metadata = {"adamwprune": json.dumps({"format": "packed-weights/1"})}
    save_file(good, tmp_path / "w", metadata)
    assert int(load_packed(tmp_path / "w")["w"].sum()) == 2
    save_file({key: value for key, value in (good | change).items() if value is not None}, tmp_path / "w", metadata)
    with pytest.raises(ValueError, match=r"w: w has"):
        load_packed(tmp_path / "w")
