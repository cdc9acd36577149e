"""`_info.json`, indices and tars made up and damaged by hypothesis: a ValueError or an OSError, and nothing outside."""

import contextlib
import copy
import hashlib
import io
import json
import struct
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hostile import snapshot
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from toolkit.data import remote
from toolkit.data.decode import BadImageError, decode_rgb
from toolkit.data.index import load_split, read_index, scan_shards
from toolkit.data.info import read_info
from toolkit.data.remote import fetch_info
from toolkit.data.shard_cache import load_remote_split
from toolkit.data.tar import tar_members

FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
NAMES = ["few-train-0000.tar", "few-train-0001.tar", "few-train-0002.tar"]


@contextlib.contextmanager
def guarded():
    """A folder to work in, `inside`, whose surroundings must stay as they are."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "outer" / "inside"
        folder.mkdir(parents=True)
        for where in (Path(place), folder.parent):
            (where / "precious.tar").write_bytes(b"mine")
            (where / "_info.json").write_text("mine")
        before = snapshot(Path(place), folder)
        with contextlib.suppress(ValueError, OSError):
            yield folder
        assert snapshot(Path(place), folder) == before


def strange_names():
    pieces = [
        "..",
        ".",
        "",
        "a",
        "precious.tar",
        "_info.json",
        "-x",
        "\\",
        "\n",
        "\0",
        "\ud800",
        "é",
        "$(x)",
        "`",
        "'",
        " ",
    ]
    paths = st.lists(st.sampled_from(pieces), max_size=5).map("/".join)
    return st.one_of(st.sampled_from(NAMES), paths, paths.map(lambda path: f"{path}.tar"), st.text(max_size=8))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), strange_names()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(strange_names(), inner, max_size=3)),
    max_leaves=6,
)
PLACES = [(key,) for key in ("splits", "name", "note", "num_classes")]
PLACES += [("splits", "train", key) for key in ("name", "filenames", "num_samples", "shard_lengths", "index_sha256")]
PLACES += [("splits", "train"), ("splits", "train", "filenames", 1), ("splits", "new"), ("splits", "../new")]


@st.composite
def infos(draw):
    """A good one with a value or two replaced, now and then something else altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    entry = {"name": "train", "filenames": [*NAMES], "num_samples": 96}
    info = {"name": "few", "note": "x", "num_classes": 10, "splits": {"train": entry}}
    for place in draw(st.lists(st.sampled_from(PLACES), max_size=2, unique=True)):
        holder = info
        for key in place[:-1]:
            holder = holder[key] if isinstance(holder, dict) and key in holder else {}
        new = draw(
            st.one_of(strange_names(), VALUES, st.lists(strange_names(), max_size=3), st.just(copy.deepcopy(entry)))
        )
        if isinstance(holder, dict) or (isinstance(holder, list) and isinstance(place[-1], int) and len(holder) > 1):
            holder[place[-1]] = new
    return info


@pytest.fixture
def served(few_digits, monkeypatch, webdataset):
    """What a server sends, by name; a transfer is a copy."""
    files = {path.name: path.read_bytes() for path in few_digits.iterdir() if path.is_file()}

    def transfer(url, target, limit_bytes):
        name = url.removeprefix("http://host/")
        if name not in files:
            raise OSError("404")
        if len(files[name]) > limit_bytes:
            raise OSError("more came than was expected")
        Path(target).write_bytes(files[name])

    monkeypatch.setattr(remote, "_transfer", transfer)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0)
    return files


def start(folder):
    """What a run does with a data set behind a URL, as far as its first image."""
    info = fetch_info("http://host", folder / "cache")
    for split in info["splits"]:
        index, cache = load_remote_split("http://host", info, split, folder / "cache", 2**20)
        if len(index):
            cache.open(int(index.shard[0]))


@FUZZ
@given(info=infos())
@example(info={"splits": {"train": {"filenames": ["../precious.tar"]}}})
@example(info={"splits": {"../precious": {"filenames": NAMES}}})
def test_any_info(served, info):
    served["_info.json"] = json.dumps(info).encode()
    with guarded() as folder:
        start(folder)
    with guarded() as folder:
        (folder / "_info.json").write_bytes(served["_info.json"])
        for split in read_info(folder)["splits"]:
            load_split(folder, split)


@FUZZ
@given(content=st.one_of(st.binary(max_size=40), st.integers(1, 200_000).map(lambda depth: b"[" * depth)))
def test_any_bytes_for_an_info(served, content):
    served["_info.json"] = content
    with guarded() as folder:
        start(folder)


def index_bytes(columns, facts):
    """A file of safetensors' format with any columns, (dtype, values), and any metadata."""
    header, data = {"__metadata__": {"shards": facts}}, b""
    for key, (kind, values) in columns.items():
        header[key] = {
            "dtype": kind,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + values.nbytes],
        }
        data += values.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


COLUMNS = {"shard": "I32", "offset": "I64", "size": "I32", "label": "I32", "crc32": "U32"}
DTYPES = {"I32": np.int32, "I64": np.int64, "U32": np.uint32, "F64": np.float64, "U8": np.uint8}


@st.composite
def indices(draw):
    """A good one of a few rows with one thing replaced: a number, a column's type or length, a fact."""
    rows = draw(st.integers(0, 3))
    fault = draw(st.sampled_from(["none", "number", "number", "column", "facts", "facts"]))
    numbers = {"shard": st.integers(0, 2), "offset": st.integers(0, 9_000), "size": st.integers(0, 900)}
    lists = {key: draw(st.lists(numbers.get(key, st.integers(0, 9)), min_size=rows, max_size=rows)) for key in COLUMNS}
    kinds = dict(COLUMNS)
    if fault == "number" and rows:
        lists[draw(st.sampled_from(list(COLUMNS)))][0] = draw(st.integers(-(2**63), 2**63 - 1))
    if fault == "column":
        key = draw(st.sampled_from(list(COLUMNS)))
        kinds[key] = draw(st.sampled_from(list(DTYPES)))
        lists[key] = lists[key][:-1] if draw(st.booleans()) else lists[key] * draw(st.integers(1, 2))
    columns = {key: (kind, np.array(lists[key], np.int64).astype(DTYPES[kind])) for key, kind in kinds.items()}
    if fault == "column" and draw(st.booleans()):
        del columns[draw(st.sampled_from(list(COLUMNS)))]
    facts = {"schema": "shard-index/1", "names": NAMES, "bytes": [10_240] * 3}
    if fault == "facts":
        key = draw(st.sampled_from(["names", "bytes", "has_checksums", "modified_ns"]))
        names, sizes = st.lists(strange_names(), min_size=3, max_size=3), st.lists(st.integers(0, 2**65), max_size=4)
        facts[key] = draw(st.one_of(VALUES, names if key == "names" else sizes))
    return index_bytes(columns, json.dumps(facts) if draw(st.integers(0, 19)) else draw(st.text(max_size=5)))


@FUZZ
@given(content=indices(), hashed=st.booleans())
def test_any_index(served, content, hashed):
    served["train.index.safetensors"] = content
    info = {"splits": {"train": {"filenames": NAMES}}}
    if hashed:
        info["splits"]["train"]["index_sha256"] = hashlib.sha256(content).hexdigest()
    served["_info.json"] = json.dumps(info).encode()
    with guarded() as folder:
        start(folder)


@FUZZ
@given(data=st.data())
def test_a_damaged_index(few_digits, data):
    content = bytearray((few_digits / "train.index.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, 1_000), st.integers(0, len(content) - 1)))
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    with guarded() as folder:
        (folder / "x").write_bytes(bytes(content))
        index = read_index(folder, folder / "x")
        within = index.offset + index.size <= np.array(index.shard_bytes)[index.shard]
        assert (within & (index.label >= 0) & (index.size >= 0)).all()


def header(name, size, kind, raw_size=None):
    """One tar header block with a good checksum; `raw_size` replaces the 12 bytes of the size field."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")[-512:])
    if raw_size is not None:
        block[124:136] = raw_size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SIZES = st.one_of(
    st.none(),
    st.sampled_from(
        [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0", b"-0000000001\0", b"\xff" * 11 + b"\x00", b"x" * 12]
    ),
    st.integers(0, 2**40).map(lambda n: b"\x80" + n.to_bytes(11, "big")),
    st.integers(1, 2**40).map(lambda n: b"\xff" + (2**88 - n).to_bytes(11, "big")),
)
KINDS = st.one_of(st.just(b"0"), st.just(b"0"), st.sampled_from([bytes([c]) for c in b"\0001234567LKSxgXDVMNA"]))
BLOCKS = st.builds(
    lambda name, content, kind, size: (
        header(name, len(content), kind, size) + content + bytes(-len(content) % tarfile.BLOCKSIZE)
    ),
    st.sampled_from(["a.jpg", "a.cls", "./b.jpg", "../c.jpg", "/d.cls", "b.cls"]),
    st.one_of(
        st.just(b"3"),
        st.binary(max_size=600),
        st.sampled_from(
            [
                b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n",
                b"30 size=99999999999999999999999\n",
                b"12 size=-99\n",
                b"12 size=0x1\n",
                b"20 path=../../../x\n\n",
                b"999999999 path=x\n",
                b"27 GNU.sparse.map=0,1,2,3\n\n",
                b"26 GNU.sparse.realsize=9\n\n",
                b"26 GNU.sparse.numblocks=x\n",
                b"20 hdrcharset=BINARY\n",
            ]
        ),
    ),
    KINDS,
    SIZES,
)


@settings(FUZZ, max_examples=200)
@given(
    blocks=st.lists(BLOCKS, max_size=6),
    tail=st.sampled_from([bytes(1024), b"", bytes(512), b"x" * 512]),
    checksums=st.booleans(),
)
@example(blocks=[header("a", 0, b"L")] * 2_000, tail=bytes(1024), checksums=False)
@example(blocks=[header("a", 0, b"0", b"\xff" * 11 + b"\x00")], tail=bytes(1024), checksums=False)
def test_any_tar(blocks, tail, checksums):
    with guarded() as folder:
        path = folder / "x.tar"
        path.write_bytes(b"".join(blocks) + tail)
        index = scan_shards(folder, ["x.tar"], checksums=checksums)
        within = (index.offset >= 0) & (index.size >= 0) & (index.offset + index.size <= path.stat().st_size)
        assert (within & (index.label >= 0)).all()


@settings(FUZZ, max_examples=100)
@given(data=st.data())
def test_a_damaged_tar(few_digits, data):
    content = bytearray((few_digits / NAMES[0]).read_bytes()[: 512 * 24] + bytes(1024))
    for _ in range(data.draw(st.integers(1, 5))):
        block = data.draw(st.integers(0, len(content) // 512 - 1))
        place = 512 * block + data.draw(st.one_of(st.integers(124, 157), st.integers(0, 511)))
        content[place] = data.draw(st.integers(0, 255))
        old = content[512 * block : 512 * block + 512]
        old[148:156] = b" " * 8
        if data.draw(st.booleans()):  # as if it were meant
            content[512 * block + 148 : 512 * block + 156] = b"%06o\0 " % sum(old)
    with guarded() as folder:
        (folder / "x.tar").write_bytes(bytes(content))
        for _, offset, size in tar_members(folder / "x.tar", {}):
            assert 0 <= offset <= offset + size <= len(content)


@settings(FUZZ, max_examples=60)
@given(data=st.data())
def test_a_damaged_image(data):
    from PIL import Image

    kind = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16), (9, 99, 199)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadImageError):
        assert decode_rgb(bytes(content)).nbytes <= 3 * 89_478_485


def test_the_guard_would_notice():
    with pytest.raises(AssertionError), guarded() as folder:
        (folder.parent / "precious.tar").unlink()
    with pytest.raises(AssertionError), guarded() as folder:
        (folder.parent / "new").touch()
    with pytest.raises(TypeError), guarded():
        raise TypeError
