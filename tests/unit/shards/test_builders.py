import hashlib
import io

import numpy as np
import pytest
from PIL import Image

import shards.digits
import shards.drawing
import shards.synthetic
import shards.writer
from shards.writer import Sample, write_data_set, write_split
from toolkit.data.index import load_split
from toolkit.data.info import read_info


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_digits_are_the_same_bytes_each_time(tmp_path, digits):
    shards.digits.main(["--out", str(tmp_path / "again"), "--train-shards", "5"])
    assert hashes(tmp_path / "again") == hashes(digits)


def test_digits_are_stratified_and_complete(digits):
    train, validation = load_split(digits, "train"), load_split(digits, "validation")
    assert len(train) + len(validation) == 1797
    counts = [np.bincount(index.label, minlength=10) for index in (train, validation)]
    shares = counts[1] / (counts[0] + counts[1])
    assert np.all(np.abs(shares - 0.2) < 0.004)
    assert not set(train.crc32.tolist()) & set(validation.crc32.tolist())
    info = read_info(digits)
    assert info["num_classes"] == 10
    assert "8×8" in info["note"]
    with open(digits / train.names[0], "rb") as file:
        file.seek(int(train.offset[0]))
        image = Image.open(io.BytesIO(file.read(int(train.size[0]))))
    assert (image.size, image.format) == ((32, 32), "JPEG")


def test_hard_digits_have_three_splits_apart_and_repeat(tmp_path, digits):
    for name in ("a", "b"):
        shards.digits.main(["--hard", "--out", str(tmp_path / name)])
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    splits = {split: load_split(tmp_path / "a", split) for split in ("train", "tuning", "validation", "unseen")}
    assert [len(index) for index in splits.values()] == [300, 500, 997, len(load_split(digits, "validation"))]
    assert np.bincount(splits["train"].label).tolist() == [30] * 10
    assert np.bincount(splits["tuning"].label).tolist() == [50] * 10
    keys = [set(zip(index.crc32.tolist(), index.size.tolist(), strict=True)) for index in splits.values()]
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]
    assert keys[3] < keys[2]
    assert "Gaussian noise" in read_info(tmp_path / "a")["note"]


def test_synthetic_is_labelled_learnable_and_repeats(tmp_path):
    flags = ["--classes", "6", "--images", "24", "--validation", "6", "--size", "48", "--shards", "2"]
    for name in ("a", "b"):
        shards.synthetic.main([*flags, "--out", str(tmp_path / name)])
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    info = read_info(tmp_path / "a")
    assert info["synthetic"] is True
    assert info["note"].startswith("SYNTHETIC")
    index = load_split(tmp_path / "a", "train")
    assert np.bincount(index.label).tolist() == [4] * 6


def test_synthetic_images_of_a_class_are_alike():
    def centre(label, seed):
        return shards.drawing.draw(label, 64, 64, np.random.default_rng(seed))[24:40, 24:40].mean((0, 1))

    within = np.mean([np.linalg.norm(centre(c, 1) - centre(c, 2)) for c in range(12)])
    between = np.mean([np.linalg.norm(centre(c, 1) - centre(c + 1, 2)) for c in range(12)])
    assert within < 0.6 * between


def test_writer_refuses_more_shards_than_samples(tmp_path):
    with pytest.raises(ValueError, match="3 shards for 2 train images"):
        write_split(tmp_path, "train", "x", [Sample(str(i), 0, bytes) for i in range(2)], 3)


def test_a_builder_that_fails_leaves_no_finished_data_set(tmp_path):
    def broken():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_split(tmp_path, "train", "x", [Sample("a", 0, broken)], 1)
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("flags", [["--images", "0"], ["--images", "3", "--shards", "5"]])
def test_bad_flags_are_one_line(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        shards.synthetic.main([*flags, "--out", str(tmp_path / "x"), "--size", "32"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("shards.synthetic: error:")


def test_a_shard_has_the_bytes_that_webdataset_would_write(tmp_path, webdataset):
    rows = [("a", 3, {"label": 3, "filename": "a.jpg"}, "jpg"), ("größe/" + 120 * "b", 11, {"filename": "ä"}, "png")]
    samples = [Sample(key, label, lambda: b"bytes", meta, extension) for key, label, meta, extension in rows]
    shards.writer.write_shard(tmp_path / "ours.tar", samples)
    with (
        open(tmp_path / "theirs.tar", "wb") as file,
        webdataset.TarWriter(file, user="", group="", mtime=0) as tar,
    ):
        for key, label, meta, extension in rows:
            tar.write({"__key__": key, extension: b"bytes", "cls": label, "json": meta})
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_what_a_stopped_rebuild_leaves_has_no_counts_of_the_old_build(tmp_path):
    """The writer's last word is `_info.json`: while it works, or when it stops, none of an older build stands."""

    def splits(count):
        return {split: ([Sample(str(i), 0, bytes) for i in range(count)], 2) for split in ("train", "validation")}

    def stop():
        found.append({path.name for path in tmp_path.iterdir()})
        raise KeyboardInterrupt

    found = []
    write_data_set(tmp_path, "x", 1, splits(6))
    whole = hashes(tmp_path)
    with pytest.raises(ValueError, match="2 shards for 1 validation images"):
        write_data_set(tmp_path, "x", 1, splits(6) | {"validation": ([Sample("0", 0, bytes)], 2)})
    assert hashes(tmp_path) == whole  # refused before anything is touched
    again = splits(4)
    again["train"][0][1] = Sample("1", 0, stop)
    with pytest.raises(KeyboardInterrupt):
        write_data_set(tmp_path, "x", 1, again)
    assert not {"_info.json", "train.index.safetensors", "validation.index.safetensors"} & found[0]
    assert not (tmp_path / "_info.json").exists()
    write_data_set(tmp_path, "x", 1, splits(4))
    assert [len(load_split(tmp_path, split)) for split in ("train", "validation")] == [4, 4]
