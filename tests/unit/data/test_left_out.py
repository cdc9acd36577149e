"""Nothing in a shard is lost without a word: it is read, or counted and named by reason, or the start stops."""

import io
import itertools
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolkit.data.index import index_path, load_split, read_index, scan_shards
from toolkit.data.tar import DOTTED, FORMAT, HIDDEN, IMAGE_SUFFIXES, LINK, LOST, ORPHAN, SECOND


def write(path, members):
    """A tar of (name, content) pairs; (name, None, target) is a link, hard if it names an earlier member."""
    with tarfile.open(path, "w") as tar:
        names = set()
        for name, content, *target in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.LNKTYPE if target[0] in names else tarfile.SYMTYPE, target[0]
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            names.add(name)


def pair(key, label, suffix="jpg"):
    return [(f"{key}.{suffix}", f"{key}/{label}".encode()), (f"{key}.cls", str(label).encode())]


def read(folder, *members, split="train"):
    """(label, image bytes) of each sample, and the counts of what was left out."""
    path = folder / f"x-{split}-0.tar"
    write(path, members)
    index = load_split(folder, split)
    data = path.read_bytes()
    rows = zip(index.label.tolist(), index.offset.tolist(), index.size.tolist(), strict=True)
    images = [(label, data[at : at + size]) for label, at, size in rows]
    return images, {reason: count for reason, (count, _) in index.left_out.items()}


def test_a_key_that_comes_again_is_another_sample(tmp_path):
    members = [*pair("a", 0), *pair("b", 1), *pair("a", 3)]
    assert read(tmp_path, *members) == ([(0, b"a/0"), (1, b"b/1"), (3, b"a/3")], {})


def test_a_key_that_comes_again_without_its_label_stops(tmp_path):
    with pytest.raises(ValueError, match=r"x-train-0\.tar: sample 'a' lacks its image or its \.cls"):
        read(tmp_path, *pair("a", 0), *pair("b", 1), ("a.jpg", b"?"))


def test_images_and_labels_may_lie_apart(tmp_path):
    members = [("a.jpg", b"A"), ("b.jpg", b"B"), ("b.cls", b"1"), ("a.cls", b" 0\n")]
    assert read(tmp_path, *members) == ([(0, b"A"), (1, b"B")], {})


@pytest.mark.parametrize("suffixes", itertools.permutations(("jpg", "png", "webp")))
def test_of_several_formats_the_first_in_timms_order_is_read(tmp_path, suffixes):
    members = [(f"a.{suffix}", suffix.encode()) for suffix in suffixes]
    assert read(tmp_path, *members, ("a.cls", b"2")) == ([(2, b"jpg")], {SECOND: 2})


def test_keys_end_at_the_first_dot_and_the_rest_is_counted(tmp_path, caplog):
    images, left_out = read(tmp_path, *pair("d.0/a", 5), *pair("v1.002", 1), *pair("v1.003", 1))
    assert images == [(5, b"d.0/a/5")]
    assert left_out == {DOTTED: 2, ORPHAN: 1}
    assert "left out 2 images under a key with a dot" in caplog.text
    assert "'v1.002.jpg' in x-train-0.tar" in caplog.text


def test_a_mask_beside_its_image_is_a_part_of_that_sample(tmp_path):
    assert read(tmp_path, *pair("a", 0), ("a.seg.png", b"x"), ("a.json", b"{}")) == ([(0, b"a/0")], {SECOND: 1})
    members = [*pair("b", 0), *pair("b.1", 1)]  # but this one has a label
    assert read(tmp_path, *members) == ([(0, b"b/0")], {DOTTED: 1})


@pytest.mark.parametrize("name", ["img.001", "a.b.c"])
def test_a_split_of_which_no_image_would_be_read_stops(tmp_path, name):
    with pytest.raises(ValueError, match=r"would leave out 1 images under a key with a dot.*KEY without dots") as error:
        read(tmp_path, *pair(name, 0))
    assert "\n" not in str(error.value)


def test_links_are_counted(tmp_path):
    members = [*pair("a", 0), ("b.jpg", None, "a.jpg"), ("b2.jpg", None, "/etc/passwd"), ("b.txt", b"")]
    assert read(tmp_path, *members) == ([(0, b"a/0")], {LINK: 2, ORPHAN: 1})
    with pytest.raises(ValueError, match="lacks its image"):
        read(tmp_path, *members, ("b.cls", b"1"))


def test_formats_that_shards_are_not_read_with_and_what_is_no_sample(tmp_path):
    members = [*pair("a", 0), ("b.BMP", b""), ("c.heic", b""), ("README", b""), ("._a.jpg", b""), ("__X/._a.cls", b"")]
    assert read(tmp_path, *members) == ([(0, b"a/0")], {FORMAT: 2, ORPHAN: 1, HIDDEN: 2})
    for labelled in ([("b.cls", b"1"), *members], [*members, ("b.cls", b"1")]):  # a sample of a format that is not read
        assert read(tmp_path, *labelled) == ([(0, b"a/0")], {FORMAT: 2, ORPHAN: 1, HIDDEN: 2})


def test_more_than_the_allowed_share_stops_and_fewer_do_not(tmp_path):
    good = [member for number in range(40) for member in pair(f"g{number}", number)]
    lost = [(f"v.{number}.jpg", b"") for number in range(11)]
    assert read(tmp_path, *good, *lost[:10])[1] == {DOTTED: 10}
    with pytest.raises(ValueError, match="would leave out 11 images under a key with a dot"):
        read(tmp_path, *good, *lost)
    assert len(load_split(tmp_path, "train", max_left_out=11 / 51)) == 40
    with pytest.raises(ValueError, match="would leave out 11"):
        load_split(tmp_path, "train", max_left_out=10.9 / 51)


def test_the_count_is_kept_with_the_index_and_said_each_time(tmp_path, caplog):
    read(tmp_path, *pair("a", 0), ("b.1.jpg", b""))
    assert index_path(tmp_path, "train").is_file()
    caplog.clear()
    again = load_split(tmp_path, "train")
    assert again.left_out == {DOTTED: (1, "'b.1.jpg' in x-train-0.tar")}
    assert "left out 1 images" in caplog.text
    both = scan_shards(tmp_path, again.names * 2)
    assert both.left_out == {DOTTED: (2, "'b.1.jpg' in x-train-0.tar")}


@pytest.mark.parametrize("left_out", [[], 3, {"x": 1}, {"x": [1, 2]}, {"x": ["1", "y"]}, {"x": [-1, "y"]}])
def test_an_index_with_another_shape_of_counts_is_refused(tmp_path, left_out):
    index = scan_shards(tmp_path, [])
    object.__setattr__(index, "left_out", left_out or [0])
    object.__setattr__(index, "names", ("x.tar",))
    object.__setattr__(index, "shard_bytes", (0,))
    index.save(index_path(tmp_path, "train"))
    with pytest.raises(ValueError, match="left_out is no count by reason"):
        read_index(tmp_path, index_path(tmp_path, "train"))


@pytest.mark.parametrize("gap", [0, 512, 10_240, 2**20 + 512])
def test_a_second_tar_after_the_end_mark_stops(tmp_path, gap):
    path = tmp_path / "x-train-0.tar"
    write(path, pair("b", 1))
    second = path.read_bytes()
    write(path, pair("a", 0))
    first = path.read_bytes()
    path.write_bytes(first + bytes(gap))
    assert len(load_split(tmp_path, "train")) == 1
    path.write_bytes(first + bytes(gap) + second)
    with pytest.raises(ValueError, match=r"x-train-0\.tar is no whole tar \(data follow its end mark"):
        load_split(tmp_path, "train")


@pytest.mark.parametrize(
    "text", ["-1", "-0", "2147483648", "9999999999999", "1_0", "1.0", "", "cat", "0x1", "٣", "1" * 65, "1" + " " * 64]
)
def test_labels_that_are_no_class_numbers_stop(tmp_path, text):
    with pytest.raises(ValueError, match="not a class number from 0 to 2147483647"):
        read(tmp_path, ("a.jpg", b""), ("a.cls", text.encode()))


@pytest.mark.parametrize(("text", "label"), [("2147483647", 2**31 - 1), (" 007\n", 7), ("+4", 4), ("0" * 63 + "5", 5)])
def test_labels_are_read(tmp_path, text, label):
    assert read(tmp_path, ("a.jpg", b""), ("a.cls", text.encode()))[0] == [(label, b"")]


MEMBER = st.tuples(
    st.sampled_from(["a", "b", "c/a", "a.1", ".a", "v1.0/b"]),
    st.sampled_from(["jpg", "JPG", "jpeg", "png", "webp", "cls", "json", "bmp", "seg.png", "txt"]),
)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(members=st.lists(MEMBER, max_size=8), links=st.integers(0, 2))
def test_every_image_is_read_or_counted_or_the_shard_stops(tmp_path, members, links):
    path = tmp_path / "x-train-0.tar"
    content = [(f"{key}.{suffix}", b"7" if suffix == "cls" else b"image") for key, suffix in members]
    write(path, [*content, *((f"l{n}.jpg", None, "gone") for n in range(links))])
    try:
        index = scan_shards(tmp_path, [path.name])
    except ValueError as error:
        assert "lacks its image or its .cls" in str(error)  # noqa: PT017
        return
    counts = {reason: count for reason, (count, _) in index.left_out.items()}
    hidden = [name for name, _ in content if name.rpartition("/")[2].startswith(".")]
    images = [
        name
        for name, _ in content
        if name not in hidden and name.rpartition(".")[2].lower() in (*IMAGE_SUFFIXES, "bmp")
    ]
    read_or_counted = len(index) + sum(counts.get(reason, 0) for reason in (*LOST, SECOND))
    assert read_or_counted == len(images) + links
    assert counts.get(HIDDEN, 0) == len(hidden)
    assert np.all(index.label == 7)
    assert np.all(np.diff(index.offset) > 0)
