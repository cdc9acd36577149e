"""What `_info.json`, indices, tar headers and images claim is held against what is there before it costs anything."""

import io
import json
import shutil
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
from hostile import change_info, changed_index
from PIL import Image

from toolkit.builder.data import open_data
from toolkit.cli import parse
from toolkit.data import decode
from toolkit.data.decode import BadImageError, EvalTransform, decode_rgb
from toolkit.data.index import index_path, load_split, read_index, scan_shards
from toolkit.data.loader import EvalLoader
from toolkit.data.shard_cache import ShardCache
from toolkit.files import UnsafeNameError


@pytest.fixture
def copy(few_digits, tmp_path):
    return shutil.copytree(few_digits, tmp_path / "few")


@pytest.fixture(autouse=True)
def little_memory():
    """No test here may take more than 100 MB, whatever is claimed."""
    tracemalloc.start()
    yield
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 100e6


CHANGES = {
    "a shard beyond the last": ("shard", 3),
    "a shard before the first": ("shard", -1),
    "a negative offset": ("offset", -1),
    "an offset behind the end": ("offset", 2**62),
    "a negative size": ("size", -1),
    "a size behind the end": ("size", 2**31 - 1),
    "a negative label": ("label", -1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_points_elsewhere_is_an_error(few_digits, tmp_path, change):
    column, value = CHANGES[change]
    values = getattr(load_split(few_digits, "train"), column).copy()
    values[17] = value
    changed_index(few_digits, **{column: values}).save(tmp_path / "x")
    with pytest.raises(ValueError, match=r"image 17 .* is not within its shard"):
        read_index(few_digits, tmp_path / "x")


def test_an_image_larger_than_any_photograph_is_an_error(few_digits, tmp_path):
    size = load_split(few_digits, "train").size.copy()
    size[5] = 2**28 + 1
    changed_index(few_digits, size=size, shard_bytes=(2**40,) * 3).save(tmp_path / "x")
    with pytest.raises(ValueError, match=r"image 5 .* has more than 268,435,456 bytes"):
        read_index(few_digits, tmp_path / "x")


def test_columns_of_other_types_or_lengths_are_an_error(few_digits, tmp_path):
    from safetensors.numpy import save

    index = load_split(few_digits, "train")
    columns = {key: getattr(index, key) for key in ("shard", "offset", "size", "label", "crc32")}
    shards = json.dumps({"names": index.names, "bytes": index.shard_bytes})
    for label in (index.label.astype(np.float32), index.label[:-1], index.label[None]):
        (tmp_path / "x").write_bytes(save(columns | {"label": label}, metadata={"shards": shards}))
        with pytest.raises(ValueError, match="label is no column of I32"):
            read_index(few_digits, tmp_path / "x")
    for sizes in (None, [1, 2], [2**63] * 3, [True] * 3, [-1] * 3, [1.0] * 3):
        shards = json.dumps({"names": index.names, "bytes": sizes})
        (tmp_path / "x").write_bytes(save(columns, metadata={"shards": shards}))
        with pytest.raises(ValueError, match="bytes is not a whole number a shard"):
            read_index(few_digits, tmp_path / "x")
    for facts in ([], {}, {"names": "abc"}):
        (tmp_path / "x").write_bytes(save(columns, metadata={"shards": json.dumps(facts)}))
        with pytest.raises(ValueError, match=r"does not list the names|of which shards"):
            read_index(few_digits, tmp_path / "x")


def test_an_index_header_that_claims_more_than_the_file_is_an_error(tmp_path):
    claim = json.dumps({"shard": {"dtype": "I32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for content in (len(claim).to_bytes(8, "little") + claim, (2**62).to_bytes(8, "little") + b"{"):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(ValueError, match="is no index"):
            read_index(tmp_path, tmp_path / "x")


def test_an_index_beyond_the_limit_is_not_read(few_digits, monkeypatch):
    monkeypatch.setattr("toolkit.data.index.INDEX_LIMIT_BYTES", 1_000)
    with pytest.raises(ValueError, match="is larger than 1,000 bytes"):
        read_index(few_digits, index_path(few_digits, "train"))


def test_no_room_is_kept_for_a_shard_that_claims_terabytes(few_digits, tmp_path):
    index = changed_index(few_digits, shard_bytes=(2**45,) * 3, folder=tmp_path)
    with pytest.raises(ValueError, match="does not hold two shards"):
        ShardCache("http://127.0.0.1:9/x", index, 2**40)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info, train: info.update(splits=[]), "has no splits"),
        (lambda info, train: info.update(name=[1]), "name .* is no text"),
        (lambda info, train: info.update(note={"a": 1}), "note .* is no text"),
        (lambda info, train: info.update(num_classes=True), "num_classes True is no number from 1 to 1,048,576"),
        (lambda info, train: info.update(num_classes=2**20 + 1), "num_classes 1048577 is no number from"),
        (lambda info, train: info.update(num_classes=10.0), "num_classes 10.0 is no number"),
        (lambda info, train: info["splits"].update(train=[]), "split 'train' is no mapping"),
        (lambda info, train: train.pop("filenames"), "split 'train' does not list the names"),
        (lambda info, train: train.update(filenames="a.tar"), "split 'train' does not list the names"),
        (lambda info, train: train.update(filenames=[]), "split 'train' does not list the names"),
        (lambda info, train: train.update(filenames=[["a.tar"]]), "split 'train': shard .* is not a plain name"),
        (lambda info, train: train.update(num_samples="96"), "num_samples '96' is no number"),
        (lambda info, train: train.update(num_samples=-1), "num_samples -1 is no number"),
        (lambda info, train: train.update(num_samples=float("nan")), "num_samples nan is no number"),
        (lambda info, train: train.update(index_sha256="x"), "index_sha256 'x' is no SHA-256"),
    ],
)
def test_an_info_of_another_shape_is_an_error_of_one_line(copy, change, message):
    change_info(copy, lambda info: change(info, info["splits"]["train"]))
    with pytest.raises(ValueError, match=message) as caught:
        load_split(copy, "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"7", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"9" * 9_999])
def test_an_info_that_is_no_mapping_is_an_error(copy, content):
    (copy / "_info.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"has no splits|is not JSON"):
        load_split(copy, "train")


def test_json_beyond_the_limit_is_not_read(copy):
    (copy / "_info.json").write_bytes(b" " * 2**24 + b"{}")
    with pytest.raises(ValueError, match="has more than 16,777,216 bytes of JSON"):
        load_split(copy, "train")


def test_labels_do_not_make_a_classifier_of_any_size(copy):
    label = load_split(copy, "train").label.copy()
    label[0] = 2**30
    changed_index(copy, label=label).save(index_path(copy, "train"))
    change_info(copy, lambda info: info.pop("num_classes"))
    data = open_data(parse(["--data-dir", str(copy)]))
    with pytest.raises(ValueError, match="label 1073741824 is beyond the 1,048,576 classes"):
        _ = data.num_classes


def test_a_local_data_set_is_held_to_the_same_names(copy, tmp_path):
    (tmp_path / "precious.tar").write_bytes(b"mine")
    change_info(copy, lambda info: info["splits"]["train"].update(filenames=["../precious.tar"]))
    with pytest.raises(UnsafeNameError, match=r"'\.\./precious\.tar'"):
        load_split(copy, "train")


def test_a_lock_or_an_index_is_not_written_through_a_link(copy, tmp_path):
    """A data set that came as an archive may hold links in the places where this host writes."""
    for name in ("train.index.safetensors", "train.index.safetensors.lock"):
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(tmp_path / f"precious-{name}")
        (tmp_path / f"precious-{name}").write_bytes(b"mine")
    with pytest.raises((ValueError, OSError)):
        load_split(copy, "train")
    (copy / "train.index.safetensors").unlink()
    with pytest.raises(OSError, match="symbolic links"):
        load_split(copy, "train")
    assert all(path.read_bytes() == b"mine" for path in tmp_path.glob("precious-*"))


def tar_of(path, *members, raw_size=None):
    """A tar of (name, content); `raw_size`: the size field of the first, with a good checksum."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            if name.startswith("type:"):
                member.name, member.type = "x", name[5:].encode()
            tar.addfile(member, io.BytesIO(content))
    if raw_size is not None:
        data = bytearray(path.read_bytes())
        data[124:136] = raw_size
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        path.write_bytes(data)


TERABYTES = b"\x80" + (2**45).to_bytes(11, "big")
NEGATIVE = b"\xff" * 10 + b"\xfe\x00"  # -512: tarfile would read the same header for ever


@pytest.mark.parametrize("size", [TERABYTES, NEGATIVE])
@pytest.mark.parametrize("first", ["a.jpg", "a.cls", "a.txt", "type:L", "type:x", "type:g", "type:S", "type:Z"])
@pytest.mark.parametrize("checksums", [True, False])
def test_a_tar_header_that_claims_terabytes_is_an_error(tmp_path, first, size, checksums):
    tar_of(tmp_path / "x.tar", (first, b"1"), ("a.jpg", b"1"), ("a.cls", b"1"), raw_size=size)
    with pytest.raises(ValueError, match=r"x\.tar is no whole tar"):
        scan_shards(tmp_path, ["x.tar"], checksums=checksums)


def test_a_chain_of_headers_is_an_error(tmp_path):
    tar_of(tmp_path / "x.tar", *[("type:L", b"")] * 1_000)
    with pytest.raises(ValueError, match=r"x\.tar is no whole tar"):
        scan_shards(tmp_path, ["x.tar"])


@pytest.mark.parametrize("label", [b"-1", b"2147483648", b"9" * 60, b"9" * 5_000, b"", b"cat", b"1.0"])
def test_a_label_that_is_no_class_number_is_an_error(tmp_path, label):
    tar_of(tmp_path / "x.tar", ("a.jpg", b"1"), ("a.cls", label))
    with pytest.raises(ValueError, match=r"'a\.cls' holds .* not a class number from 0 to 2147483647"):
        scan_shards(tmp_path, ["x.tar"])


@pytest.mark.parametrize("name", ["/a.jpg", "../a.jpg", "x/../../a.jpg", "a\nb.jpg", "a\\b.jpg"])
def test_a_member_name_that_leads_out_is_an_error_that_shows_it(tmp_path, name):
    tar_of(tmp_path / "x.tar", (name, b"1"), (name.replace("jpg", "cls"), b"1"))
    with pytest.raises(UnsafeNameError) as caught:
        scan_shards(tmp_path, ["x.tar"])
    assert repr(name) in str(caught.value)


def test_names_that_only_look_odd_are_taken(tmp_path):
    for number, name in enumerate(["./a", "-0aB", "ünï", "a b", "caf\udce9", "a'$(x)"]):
        tar_of(tmp_path / f"{number}.tar", (f"{name}.jpg", b"1"), (f"{name}.cls", b"7"))
        assert scan_shards(tmp_path, [f"{number}.tar"]).label.tolist() == [7]


def jpeg(width, height):
    """A small JPEG whose header claims other sides."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


def png(width, height):
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")


BOMBS = {
    "JPEG": jpeg(65_500, 65_500),
    "JPEG just beyond": jpeg(9_460, 9_460),
    "PNG": png(100_000, 100_000),
    "PNG just beyond": png(9_460, 9_460),
    "GIF": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x08\0;",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\nshowpage\n%%EOF\n",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("fast", [True, False])
def test_a_decompression_bomb_is_a_bad_image(monkeypatch, kind, fast):
    if not fast:
        monkeypatch.setattr(decode, "simplejpeg", None)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(BadImageError):
        decode_rgb(BOMBS[kind])


def test_a_bomb_costs_one_image_and_not_the_run(tmp_path, few_digits):
    whole = (few_digits / "few-train-0000.tar").read_bytes()
    index = load_split(few_digits, "train")
    good = whole[index.offset[0] : index.offset[0] + index.size[0]]
    members = [
        (f"{number}.{suffix}", content)
        for number, image in enumerate([good, *BOMBS.values(), good])
        for suffix, content in (("jpg", image), ("cls", b"3"))
    ]
    tar_of(tmp_path / "x-train.tar", *members)
    index = load_split(tmp_path, "train")
    loader = EvalLoader(index, EvalTransform((16, 16)), (16, 16), batch_size=4, rank=0, num_ranks=1)
    batches = list(loader)
    assert sum(batch.num_bad for batch in batches) == len(BOMBS)
    assert sum(float(batch.weights.sum()) for batch in batches) == 2
