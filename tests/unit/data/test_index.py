import json
import shutil

import numpy as np
import pytest
from timm.data import create_dataset

from toolkit.data.index import index_path, load_split, scan_shards
from toolkit.data.info import read_info
from toolkit.process import in_processes


@pytest.fixture
def copy(few_digits, tmp_path):
    return shutil.copytree(few_digits, tmp_path / "few")


def test_index_points_at_the_images(few_digits, webdataset):
    index = load_split(few_digits, "train")
    read = []
    for name in index.names:
        read += list(webdataset.WebDataset(str(few_digits / name), shardshuffle=False))
    assert len(read) == len(index) == 96
    for i, sample in enumerate(read):
        with open(few_digits / index.names[index.shard[i]], "rb") as file:
            file.seek(index.offset[i])
            assert file.read(index.size[i]) == sample["jpg"]
        assert index.label[i] == int(sample["cls"])


def same_rows(first, second):
    return all(
        np.array_equal(getattr(first, key), getattr(second, key)) for key in ("shard", "offset", "size", "label")
    )


def test_scan_of_foreign_shards_equals_the_written_index(copy):
    written = load_split(copy, "train")
    index_path(copy, "train").unlink()
    scanned = load_split(copy, "train")
    assert same_rows(written, scanned)
    assert written.has_checksums
    assert not scanned.has_checksums
    assert same_rows(load_split(copy, "train"), written)  # as it was kept beside the shards
    (copy / "_info.json").unlink()  # the splits are then seen from the names
    index_path(copy, "train").unlink()
    assert same_rows(load_split(copy, "train"), written)
    assert read_info(copy)["splits"].keys() == {"train", "validation"}


def test_a_scanned_index_follows_the_shards(copy):
    index_path(copy, "train").unlink()
    (copy / "_info.json").unlink()
    before = load_split(copy, "train")
    shutil.copy(copy / "few-train-0000.tar", copy / "few-train-0001.tar")
    after = load_split(copy, "train")
    assert not same_rows(before, after)
    assert np.array_equal(after.label[after.shard == 0], after.label[after.shard == 1])


def test_an_index_of_a_folder_that_cannot_be_written_goes_to_the_cache(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    index_path(copy, "train").unlink()
    load_split(copy, "train")
    assert not index_path(copy, "train").exists()
    assert len(list((tmp_path / "cache").rglob("train.index.safetensors"))) == 1


def test_a_stale_index_in_a_folder_that_cannot_be_written_gives_way_to_the_cache(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index_path(copy, "train").unlink()
    (copy / "_info.json").unlink()
    before = load_split(copy, "train")
    stale = index_path(copy, "train").read_bytes()
    shutil.copy(copy / "few-train-0000.tar", copy / "few-train-0001.tar")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    after = load_split(copy, "train")
    assert not same_rows(before, after)
    assert index_path(copy, "train").read_bytes() == stale
    assert same_rows(load_split(copy, "train"), after)


def test_many_shards_are_scanned_by_several_processes(few_digits, monkeypatch):
    monkeypatch.setattr("toolkit.data.index._SCAN_ALONE", 1)
    names = load_split(few_digits, "train").names
    assert same_rows(scan_shards(few_digits, names, run=in_processes), load_split(few_digits, "train"))


def test_timms_reader_reads_our_shards(few_digits, webdataset):
    data = create_dataset("wds/", root=str(few_digits), split="validation", is_training=False, batch_size=8)
    assert sum(1 for _ in data) == 40


def test_missing_and_short_shards_are_named(copy):
    shard = copy / "few-train-0001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1024])
    with pytest.raises(ValueError, match=r"few-train-0001\.tar has \d+ bytes, its index says"):
        load_split(copy, "train")
    shard.unlink()
    with pytest.raises(ValueError, match=r"few-train-0001\.tar is missing"):
        load_split(copy, "train")
    index_path(copy, "train").unlink()
    with pytest.raises(ValueError, match=r"few-train-0001\.tar is missing"):
        load_split(copy, "train")


def test_a_shard_cut_at_a_member_border_is_found_without_an_index(copy):
    """webdataset's reader loses the rest of such a shard without a word."""
    shard = copy / "few-train-0002.tar"
    index = load_split(copy, "train")
    index_path(copy, "train").unlink()
    last = index.offset[index.shard == 2][-1] - 512
    shard.write_bytes(shard.read_bytes()[:last])
    with pytest.raises(ValueError, match=r"few-train-0002\.tar|_info\.json says 96"):
        load_split(copy, "train")


def test_what_is_not_there(tmp_path, few_digits):
    with pytest.raises(ValueError, match="--data-dir is missing"):
        read_info("")
    with pytest.raises(ValueError, match="make some first"):
        read_info(tmp_path)
    with pytest.raises(ValueError, match=r"shards\.digits \(--hard for digits-hard\)"):
        read_info(tmp_path / "digits-hard")  # `--out` alone would make the easy set under this name
    with pytest.raises(ValueError, match="it has train, validation"):
        load_split(few_digits, "test")
    (tmp_path / "_info.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_info(tmp_path)
    (tmp_path / "_info.json").write_text(json.dumps({"name": "x"}))
    with pytest.raises(ValueError, match="has no splits"):
        read_info(tmp_path)


def test_fingerprint_follows_content(few_digits, digits):
    assert load_split(few_digits, "train").fingerprint != load_split(digits, "train").fingerprint


def test_shards_written_by_webdataset_are_read(few_digits, tmp_path, webdataset):
    """As others write them: images of any suffix, labels as text, more members, folders in keys."""
    jpegs = [
        sample["jpg"] for sample in webdataset.WebDataset(str(few_digits / "few-train-0000.tar"), shardshuffle=False)
    ]
    for split, count in (("train", 2), ("val", 1)):
        pattern = str(tmp_path / f"others-{split}-%06d.tar")
        with webdataset.ShardWriter(pattern, maxcount=len(jpegs) // count + 1, verbose=0) as writer:
            for number, jpeg in enumerate(jpegs):
                suffix = "jpeg" if number % 2 else "JPG"
                writer.write({"__key__": f"n{number % 3}/{number:06d}", suffix: jpeg, "cls": number % 7, "txt": "more"})
    index = load_split(tmp_path, "train")
    assert len(index.names) == 2
    assert index.label.tolist() == [number % 7 for number in range(len(jpegs))]
    for row, jpeg in enumerate(jpegs):
        data = (tmp_path / index.names[index.shard[row]]).read_bytes()
        assert data[index.offset[row] : index.offset[row] + index.size[row]] == jpeg
    assert len(load_split(tmp_path, "validation")) == len(jpegs)
