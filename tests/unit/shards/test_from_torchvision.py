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
