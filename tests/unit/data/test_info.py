"""Data sets described otherwise: read as timm reads them, or refused in one line that says what to do."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import shutil
import tarfile

import pytest

from shards.imagenet import catalogue_of
from toolkit.data.index import index_path, load_split
from toolkit.data.info import read_info


@pytest.fixture
def copy(few_digits, tmp_path):
    folder = shutil.copytree(few_digits, tmp_path / "few")
    for path in folder.glob("*.index.safetensors"):
        path.unlink()
    return folder


def refusal(function, *arguments):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the callers look at the line
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_timms_other_name_is_read(copy):
    wanted = read_info(copy)
    (copy / "_info.json").rename(copy / "info.json")
    assert read_info(copy) == wanted
    assert len(load_split(copy, "train")) == 96
    (copy / "_info.json").write_text(json.dumps({"splits": {"a": {"filenames": ["x.tar"]}}}))
    assert list(read_info(copy)["splits"]) == ["a"]  # the first of the two, as in timm


def test_a_byte_order_mark_is_no_content(copy):
    wanted, path = read_info(copy), copy / "_info.json"
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert read_info(copy) == wanted


def test_names_may_be_missing(copy):
    info = json.loads((copy / "_info.json").read_text())
    del info["name"], info["splits"]["train"]["name"], info["splits"]["train"]["num_samples"]
    (copy / "_info.json").write_text(json.dumps(info))
    assert read_info(copy)["splits"]["train"]["name"] == "train"
    assert len(load_split(copy, "train")) == 96


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "has no splits"),
        ([{"name": "train", "filenames": ["x.tar"]}], "has no splits"),
        ("train", "has no splits"),
        (None, "has no splits"),
        ({}, "has no splits"),
        ({"splits": ["train"]}, "has no splits"),
        ({"splits": {"train": ["x.tar"]}}, "split 'train' is no mapping"),
        ({"splits": {"train": {"num_samples": 3}}}, "split 'train' does not list the names of its shards"),
        ({"splits": {"train": {"filenames": "x.tar"}}}, "split 'train' does not list the names of its shards"),
        ({"splits": {"train": {"filenames": []}}}, "split 'train' does not list the names of its shards"),
    ],
)
@pytest.mark.parametrize("name", ["_info.json", "info.json"])
def test_other_shapes_are_refused_in_a_line_with_the_files_name(tmp_path, name, content, says):
    (tmp_path / name).write_text(json.dumps(content))
    line = refusal(read_info, tmp_path)
    assert f"{tmp_path / name}" in line
    assert says in line


def test_a_file_in_place_of_the_folder(copy):
    assert "is a file; name the folder" in refusal(read_info, copy / "few-train-0000.tar")


@pytest.mark.parametrize("with_info", [True, False])
def test_a_folder_in_place_of_a_shard(copy, with_info):
    if not with_info:
        (copy / "_info.json").unlink()
    (copy / "few-train-0001.tar").unlink()
    (copy / "few-train-0001.tar").mkdir()
    assert "few-train-0001.tar is a folder; pack it" in refusal(load_split, copy, "train")


@pytest.mark.parametrize("suffix", [".tar.gz", ".TGZ", ".tar.zst", ".tar.xz"])
@pytest.mark.parametrize("source", [read_info, catalogue_of])
def test_compressed_shards_are_named_and_not_passed_over(copy, suffix, source):
    (copy / "_info.json").unlink()
    shutil.move(copy / "few-train-0001.tar", copy / f"few-train-0001{suffix}")
    assert f"few-train-0001{suffix} is compressed, one of 1; unpack it" in refusal(source, copy)


@pytest.mark.parametrize(("kind", "pack"), [("gzip", gzip), ("bzip2", bz2), ("xz", lzma)])
def test_a_compressed_shard_is_known_whatever_its_name(copy, kind, pack):
    path = copy / "few-train-0001.tar"
    path.write_bytes(pack.compress(path.read_bytes()))
    assert f"few-train-0001.tar is compressed with {kind}; unpack it" in refusal(load_split, copy, "train")


def test_a_shard_of_no_split_is_named(copy, caplog):
    (copy / "_info.json").unlink()
    with tarfile.open(copy / "part-7.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    assert read_info(copy)["splits"].keys() == {"train", "validation"}
    assert "part-7.tar: neither train, val nor test" in caplog.text
    assert not index_path(copy, "train").exists()
