"""CIFAR-100's archive format, made tiny: the shards hold the same pixels and labels."""

import hashlib
import io
import pickle

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from shards import from_torchvision
from toolkit.data.decode import decode_rgb
from toolkit.data.index import load_split
from toolkit.data.info import read_info


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with six training and four test images of three classes, with checksums that torchvision accepts."""
    folder = tmp_path / "root" / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lists = {}
    for name, count in (("train", 6), ("test", 4)):
        content = {
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [i % 3 for i in range(count)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["apple", "bee", "cup"]}))
    for name in ("train", "test", "meta"):
        lists[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR100
    monkeypatch.setattr(kind, "train_list", [["train", lists["train"]]])
    monkeypatch.setattr(kind, "test_list", [["test", lists["test"]]])
    monkeypatch.setattr(kind, "meta", {"filename": "meta", "key": "fine_label_names", "md5": lists["meta"]})
    return tmp_path / "root"


def test_pixels_and_labels_are_kept(root, tmp_path):
    out = tmp_path / "out"
    from_torchvision.main(["--name", "CIFAR100", "--root", str(root), "--out", str(out), "--shards", "2"])
    info = read_info(out)
    assert (info["name"], info["num_classes"], info["class_names"]) == ("cifar100", 3, ["apple", "bee", "cup"])
    for split, train in (("train", True), ("validation", False)):
        source = torchvision.datasets.CIFAR100(str(root), train=train)
        wanted = {(np.asarray(image).tobytes(), label) for image, label in source}
        index, found = load_split(out, split), set()
        for sample in range(len(index)):
            with open(out / index.names[int(index.shard[sample])], "rb") as file:
                file.seek(int(index.offset[sample]))
                data = file.read(int(index.size[sample]))
            assert Image.open(io.BytesIO(data)).format == "PNG"
            found.add((decode_rgb(data).tobytes(), int(index.label[sample])))
        assert found == wanted


def test_a_damaged_archive_is_named(root, tmp_path, capsys):
    (root / "cifar-100-python" / "test").write_bytes(b"cut")
    with pytest.raises(SystemExit):
        from_torchvision.main(["--name", "CIFAR100", "--root", str(root), "--out", str(tmp_path / "out")])
    assert "does not hold CIFAR100 whole" in capsys.readouterr().err


def test_images_to_tune_on_are_held_out_alike_of_each_class(root, tmp_path):
    out = tmp_path / "out"
    command = ["--name", "CIFAR100", "--root", str(root), "--out", str(out), "--shards", "1"]
    from_torchvision.main([*command, "--tuning", "3", "--train-images", "2"])
    info = read_info(out)
    assert info["note"].endswith("its test images validate; 2 train, 4 validation, 3 tuning images")
    contents, labels = [], {}
    for split in info["splits"]:
        index = load_split(out, split)
        labels[split] = sorted(index.label.tolist())
        with open(out / index.names[0], "rb") as file:
            for offset, size in zip(index.offset.tolist(), index.size.tolist(), strict=True):
                file.seek(offset)
                contents.append(file.read(size))
    assert labels["tuning"] == [0, 1, 2]
    assert len(set(labels["train"])) == 2
    assert len(set(contents)) == len(contents) == 9


def test_more_to_tune_on_than_there_are_is_refused(root, tmp_path, capsys):
    command = ["--name", "CIFAR100", "--root", str(root), "--out", str(tmp_path / "out"), "--tuning", "6"]
    with pytest.raises(SystemExit):
        from_torchvision.main(command)
    assert "6 of 6 images cannot be held out; give 1 to 5" in capsys.readouterr().err
