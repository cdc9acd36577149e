"""Every file under an image folder is read, or counted and named; what is no class is none."""

import dataclasses
import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shards.imagenet import main
from shards.sources import _EMPTY, from_image_folder, from_shards
from toolkit.data.index import index_path, load_split
from toolkit.data.tar import FORMAT, HIDDEN, LINK, ORPHAN, SECOND


def put(folder, *names, content=b"x"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def counts(catalogue):
    return {split: {reason: n for reason, (n, _) in found.items()} for split, found in catalogue.left_out.items()}


@pytest.fixture
def tree(tmp_path):
    return put(tmp_path / "tree", *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in ("cat", "dog")))


@pytest.mark.parametrize("name", [".ipynb_checkpoints", ".git", "__MACOSX", "a_empty"])
@pytest.mark.parametrize("inside", [(), ("notes.txt",), ("1.jpg",)])
def test_hidden_and_empty_folders_are_no_classes(tree, name, inside):
    (tree / "train" / name).mkdir()
    put(tree / "train" / name, *inside)
    catalogue = from_image_folder(tree)
    if name == "a_empty" and inside == ("1.jpg",):
        assert catalogue.classes == ["a_empty", "cat", "dog"]
        return
    assert catalogue.classes == ["cat", "dog"]
    assert [image.label for image in catalogue.splits["train"]] == [0, 1]
    found = counts(catalogue)["train"]
    assert found.pop(_EMPTY if name == "a_empty" else HIDDEN) == 1
    assert found == ({ORPHAN: 1} if name == "a_empty" and inside else {})


def test_a_class_that_only_validation_has_stops(tree):
    put(tree, "val/emu/1.jpg")
    (tree / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match="val has class 'emu', of which train/ has no images"):
        from_image_folder(tree)


def test_links_are_followed_to_files_and_counted_where_they_lead_nowhere(tree, tmp_path):
    put(tmp_path, "elsewhere/a.jpg")
    cat = tree / "train" / "cat"
    (cat / "2.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    (cat / "3.jpg").symlink_to(tmp_path / "gone.jpg")
    (cat / "more").symlink_to(tmp_path / "elsewhere")
    (tree / "train" / "eel").symlink_to(tmp_path / "elsewhere")  # a class's folder may lie elsewhere
    catalogue = from_image_folder(tree)
    assert [image.name for image in catalogue.splits["train"]] == ["1.jpg", "2.jpg", "1.jpg", "a.jpg"]
    assert counts(catalogue) == {"train": {LINK: 2}, "validation": {}}


IMAGES = ["a.jpg", "b.JPEG", "c.png", "d.webp", "e.bmp", "f.tif", "g.TIFF", "h.gif", "i.ppm", "j.pgm", "k.jfif"]
OTHERS = {
    "x.heic": FORMAT,
    "y.avif": FORMAT,
    "z.txt": ORPHAN,
    "README": ORPHAN,
    "._a.jpg": HIDDEN,
    ".DS_Store": HIDDEN,
    ".ipynb_checkpoints/a-checkpoint.jpg": HIDDEN,
    "jpg": ORPHAN,
}


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(names=st.lists(st.sampled_from([*IMAGES, *OTHERS]), unique=True), folders=st.sampled_from(["", "deep/", "a.b/"]))
def test_every_file_is_read_or_counted(tmp_path_factory, names, folders):
    tree = put(tmp_path_factory.mktemp("t"), "train/cat/1.jpg", "val/cat/1.jpg")
    put(tree / "train" / "cat" / folders, *names)
    catalogue = from_image_folder(tree)
    assert sorted(image.name for image in catalogue.splits["train"]) == sorted({*names, "1.jpg"} - set(OTHERS))
    left_out = counts(catalogue)["train"]
    reasons = [OTHERS[name] for name in names if name in OTHERS]
    assert left_out == {reason: reasons.count(reason) for reason in reasons}


def test_files_outside_the_class_folders_are_counted(tree):
    put(tree, "train/list.txt", "val/.DS_Store", "val/stray.jpg")
    assert counts(from_image_folder(tree)) == {"train": {ORPHAN: 1}, "validation": {HIDDEN: 1, ORPHAN: 1}}


def test_imagenets_flat_validation_folder_is_named_with_a_remedy(tmp_path):
    put(tmp_path, "train/n01/a.JPEG", "val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000002.JPEG")
    with pytest.raises(ValueError, match=r"val has no images in class folders, but 2 directly.*val/<class>/") as error:
        from_image_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_what_was_left_out_is_said_and_recorded(tmp_path, capsys):
    tree = tmp_path / "tree"
    for kind in ("JPEG", "BMP", "TIFF", "GIF", "PPM"):
        data = io.BytesIO()
        Image.new("RGB", (8, 8), (9, 99, 199)).save(data, kind)
        put(tree, f"train/cat/{kind}.{kind.lower()}", f"val/cat/{kind}.{kind.lower()}", content=data.getvalue())
    put(tree, "train/cat/x.heic", "train/cat/notes.txt", "train/cat/broken.png")
    flags = ["--name", "t", "--partial", "--train-shards", "1", "--validation-shards", "1", "--workers", "1"]
    main(["--source", str(tree), "--out", str(tmp_path / "out"), *flags])
    entry = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]["train"]
    assert (entry["num_samples"], entry["left_out"]) == (5, 3)
    assert entry["left_out_reasons"] == {"images that cannot be decoded": 1, FORMAT: 1, ORPHAN: 1}
    said = capsys.readouterr().err
    for text in ("broken.png in", f"train: 1 {FORMAT}, first {tree}/train/cat/x.heic", f"train: 1 {ORPHAN}"):
        assert f"left out: {text}" in said or f"left out of {text}" in said


def shards(folder, classes=None, label=b"0"):
    for split in ("train", "val"):
        with tarfile.open(folder / f"x-{split}-0.tar", "w") as tar:
            for name, data in (("a.jpg", b"x"), ("a.png", b"y"), ("a.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    if classes is not None:
        (folder / "classes.json").write_text(json.dumps(classes))
    return folder


def test_shards_as_a_source_pass_on_what_they_left_out(tmp_path):
    assert counts(from_shards(shards(tmp_path))) == {"train": {SECOND: 1}, "validation": {SECOND: 1}}


def test_shards_with_a_label_beyond_their_classes_stop(tmp_path):
    assert from_shards(shards(tmp_path, ["a", "b", "c"], b"2")).classes == ["a", "b", "c"]
    with pytest.raises(ValueError, match="has label 2, but 2 classes"):
        from_shards(shards(tmp_path, ["a", "b"], b"2"))


def test_an_index_that_points_at_no_file_stops(tmp_path):
    index = load_split(shards(tmp_path), "train")
    dataclasses.replace(index, offset=index.offset + 1, size=index.size - 1).save(index_path(tmp_path, "train"))
    with pytest.raises(ValueError, match=r"x-train-0\.tar has no file at byte 513, its index says one"):
        from_shards(tmp_path)


def test_a_png_of_16_bits_does_not_turn_white_in_a_shard():
    from shards.dataset import Cleaning, clean_jpeg

    data = io.BytesIO()
    Image.fromarray(np.tile(np.linspace(0, 65535, 64), (48, 1)).astype(np.uint16)).save(data, "PNG")
    jpeg, *size = clean_jpeg(data.getvalue(), Cleaning())
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)), dtype=float)
    assert size == [64, 48]
    assert abs(pixels.mean() - 127.5) < 1
