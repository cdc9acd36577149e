"""Folders of pictures as shards: layouts, splits that never share an image, and sensible shards."""

import shlex
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shards import image_folder, pictures, sources, splits
from shards.sources import SourceImage
from toolkit.data.index import load_split
from toolkit.data.info import read_info
from toolkit.data.tar import ORPHAN, tar_members


def make_tree(folder: Path, counts: dict[str, int]) -> None:
    """A picture of its own colour for each image of each class folder."""
    for number, (place, count) in enumerate(counts.items()):
        (folder / place).mkdir(parents=True)
        for picture in range(count):
            Image.new("RGB", (8, 8), (number * 20, picture * 10, 99)).save(folder / place / f"{picture:04d}.png")


def members(folder: Path, split: str) -> list[tuple[str, int]]:
    """(image's content by its digest in the index, label) of each sample of a split."""
    index = load_split(folder, split)
    found = []
    for row in range(len(index)):
        path = folder / index.names[int(index.shard[row])]
        with open(path, "rb") as file:
            file.seek(int(index.offset[row]))
            found.append((file.read(int(index.size[row])).hex(), int(index.label[row])))
    return found


def test_class_folders_alone_are_divided_by_class_without_an_image_in_two_splits(tmp_path: Path) -> None:
    make_tree(tmp_path / "birds", {"emu": 20, "gull": 10})
    command = ["--source", str(tmp_path / "birds"), "--out", str(tmp_path / "out"), "--val-share", "0.2"]
    image_folder.main([*command, "--tuning", "6", "--train-images", "9", "--workers", "1", "--note", "drawn"])
    info = read_info(tmp_path / "out")
    assert info["name"] == "birds"
    assert info["num_classes"] == 2
    assert not info["synthetic"]
    assert info["note"] == "drawn; 9 train, 6 validation, 6 tuning images"
    splits = {split: members(tmp_path / "out", split) for split in info["splits"]}
    assert {split: Counter(label for _, label in rows) for split, rows in splits.items()} == {
        "train": {0: 6, 1: 3},
        "validation": {0: 4, 1: 2},
        "tuning": {0: 4, 1: 2},
    }
    contents = [content for rows in splits.values() for content, _ in rows]
    assert len(set(contents)) == len(contents) == 21


def test_another_seed_holds_out_other_images(tmp_path: Path) -> None:
    make_tree(tmp_path / "birds", {"emu": 20, "gull": 20})
    chosen = []
    for seed in (0, 0, 1):
        images = image_folder.catalogue_of(tmp_path / "birds", 0.25, seed).splits["validation"]
        chosen.append([(image.label, image.name) for image in images])
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_train_and_a_second_folder_are_taken_as_they_are(tmp_path: Path, name: str) -> None:
    make_tree(tmp_path, {"train/a": 3, "train/b": 2, f"{name}/a": 1, f"{name}/b": 1})
    catalogue = image_folder.catalogue_of(tmp_path, 0.0)
    assert {split: len(images) for split, images in catalogue.splits.items()} == {"train": 5, "validation": 2}
    assert catalogue.classes == ["a", "b"]
    assert catalogue.facts == ({"note": "its test/ validates here"} if name == "test" else {})


def test_validation_folders_come_before_test(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train/a": 3, "val/a": 2, "test/a": 1})
    assert len(image_folder.catalogue_of(tmp_path, 0.0).splits["validation"]) == 2


def test_test_beside_both_is_a_split_of_its_own(tmp_path: Path) -> None:
    make_tree(tmp_path / "birds", {"train/a": 3, "val/a": 2, "test/a": 1})
    image_folder.main(["--source", str(tmp_path / "birds"), "--out", str(tmp_path / "out")])
    assert {split: entry["num_samples"] for split, entry in read_info(tmp_path / "out")["splits"].items()} == {
        "train": 3,
        "validation": 2,
        "test": 1,
    }


def test_folders_that_are_no_split_are_counted(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train/a": 3, "val/a": 2, "test": 4, "extra/a": 1})
    (tmp_path / "README").touch()
    catalogue = image_folder.catalogue_of(tmp_path, 0.0)
    assert list(catalogue.splits) == ["train", "validation"]
    assert catalogue.left_out["train"] == {
        sources._NO_SPLIT: (2, str(tmp_path / "extra")),
        ORPHAN: (1, str(tmp_path / "README")),
    }


def test_a_test_folder_without_classes_does_not_validate(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train/a": 4, "train/b": 4, "test": 3})
    (tmp_path / "labels.csv").touch()
    with pytest.raises(ValueError, match=r"--val-share 0.1$"):
        read_info(tmp_path)
    catalogue = image_folder.catalogue_of(tmp_path, 0.25)
    assert {split: len(images) for split, images in catalogue.splits.items()} == {"train": 6, "validation": 2}
    assert catalogue.left_out["train"] == {
        sources._NO_SPLIT: (1, str(tmp_path / "test")),
        ORPHAN: (1, str(tmp_path / "labels.csv")),
    }


@pytest.mark.parametrize(("folder", "name"), [("-rf x", "rf-x"), (".hidden", "hidden"), ("--", "pictures")])
def test_any_folder_makes_a_plain_name(tmp_path: Path, folder: str, name: str) -> None:
    make_tree(tmp_path / folder, {"a": 2, "b": 2})
    out = tmp_path / "out"
    image_folder.main(["--source", str(tmp_path / folder), "--out", str(out), "--val-share", "0.5", "--workers", "1"])
    assert read_info(out)["splits"]["train"]["filenames"] == [f"{name}-train-0000.tar"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    make_tree(tmp_path, {"bus": 4, "car": 4, "train": 4})
    (tmp_path / "train" / ".thumbnails").mkdir()
    catalogue = image_folder.catalogue_of(tmp_path, 0.25)
    assert catalogue.classes == ["bus", "car", "train"]
    assert {split: len(images) for split, images in catalogue.splits.items()} == {"train": 9, "validation": 3}


def test_train_alone_is_divided_as_class_folders_are(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train/a": 6, "train/b": 6})
    with pytest.raises(ValueError, match=r"has no val/ beside train/; say which.*--val-share 0.1"):
        image_folder.catalogue_of(tmp_path, 0.0)
    catalogue = image_folder.catalogue_of(tmp_path, 0.5)
    assert {split: len(images) for split, images in catalogue.splits.items()} == {"train": 6, "validation": 6}
    assert catalogue.classes == ["a", "b"]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0])
def test_class_folders_need_a_share(tmp_path: Path, share: float) -> None:
    make_tree(tmp_path, {"a": 3})
    with pytest.raises(ValueError, match=r"has no train/.*--val-share 0.1"):
        image_folder.catalogue_of(tmp_path, share)


@pytest.mark.parametrize("share", [0.1, 0.9, -0.5, 3.0])
def test_a_share_beside_train_is_refused(tmp_path: Path, share: float) -> None:
    make_tree(tmp_path, {"train/a": 3, "val/a": 2})
    with pytest.raises(ValueError, match=rf"^--val-share {share:g} is for class folders alone.*; leave it out$"):
        image_folder.catalogue_of(tmp_path, share)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--val-share", "0.01"], "--val-share 0.01: 0 of 24 images cannot be held out; give 1 to 23 images"),
        (["--val-share", "0.99"], "--val-share 0.99: 24 of 24 images cannot be held out; give 1 to 23 images"),
        (
            ["--val-share", "0.5", "--tuning", "12"],
            "--tuning 12: 12 of 12 images cannot be held out; give 1 to 11 images",
        ),
        (
            ["--val-share", "0.5", "--tuning", "-1"],
            "--tuning -1: -1 of 12 images cannot be held out; give 1 to 11 images",
        ),
        (["--val-share", "0.5", "--train-images", "-3"], "--train-images -3: -3 of 12 images cannot be held out"),
    ],
)
def test_a_split_that_cannot_be_names_its_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    make_tree(tmp_path / "birds", {"emu": 20, "gull": 4})
    with pytest.raises(SystemExit):
        image_folder.main(["--source", str(tmp_path / "birds"), "--out", str(tmp_path / "out"), *flags])
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 9), share=st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_held_out_images_are_exact_and_alike_of_each_class(sizes: list[int], seed: int, share: float) -> None:
    images = [SourceImage("", 0, 1, f"{label}-{n}", label) for label, size in enumerate(sizes) for n in range(size)]
    count = max(1, round(len(images) * share))
    if count >= len(images):
        with pytest.raises(ValueError, match="cannot be held out"):
            splits.hold_out(images, count, seed)
        return
    rest, held = splits.hold_out(images, count, seed)
    assert len(held) == count
    assert sorted(rest + held, key=images.index) == images
    for label, size in enumerate(sizes):
        assert abs(sum(image.label == label for image in held) - size * count / len(images)) < 1.0


def test_shards_have_enough_images_or_bytes() -> None:
    small, large = SourceImage("", 0, 700, "", 0), SourceImage("", 0, 2**20, "", 0)
    assert pictures.number_of_shards([small] * 13_000) == 26
    assert pictures.number_of_shards([small] * 499) == 1
    assert pictures.number_of_shards([large] * 100) == 6
    # Bytes that change on their way into a shard do not count: 13,000 photos shrunk to 20 KB make no 800 shards.
    assert pictures.number_of_shards([large] * 13_000) == 812
    assert pictures.number_of_shards([large] * 13_000, resized=True) == 26
    assert pictures.number_of_shards([SourceImage("", 0, 2**20, "a.PNG", 0)] * 13_000) == 26


def test_imagenet_comes_out_in_as_many_shards_as_ever() -> None:
    for count, size, most, wanted in ((1_281_167, 108_000, {}, 1024), (50_000, 128_000, {"most": 64}, 64)):
        assert pictures.number_of_shards([SourceImage("", 0, size, "a.JPEG", 0)] * count, **most) == wanted


def test_a_folder_of_pictures_as_data_dir_is_answered_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path / "mine", {"train/a": 1, "val/a": 1})
    command = r"shards.image_folder --source \S+mine --out mine-shards$"
    with pytest.raises(ValueError, match=f"folder of pictures.*{command}"):
        read_info(tmp_path / "mine")
    make_tree(tmp_path / "flat", {"a": 1})
    with pytest.raises(ValueError, match=r"--out flat-shards --val-share 0.1$"):
        read_info(tmp_path / "flat")
    make_tree(tmp_path / "it's mine", {"train/a/deep": 1, "train/b": 1})
    with pytest.raises(ValueError, match="folder of pictures") as error:
        read_info(tmp_path / "it's mine")
    words = shlex.split(str(error.value).partition("python -m ")[2])
    monkeypatch.chdir(tmp_path)
    image_folder.main([word if word != "0.1" else "0.5" for word in words[1:]])
    assert read_info(tmp_path / "it's mine-shards")["name"] == "it-s-mine"


def test_the_shared_layouts_list_images_as_sources_does(tmp_path: Path) -> None:
    make_tree(tmp_path, {"train/a": 2, "val/a": 1})
    assert image_folder.catalogue_of(tmp_path, 0.0) == sources.from_image_folder(tmp_path)


def test_shards_hold_the_pictures_as_jpegs(tmp_path: Path) -> None:
    make_tree(tmp_path / "two", {"a": 4, "b": 4})
    image_folder.main(["--source", str(tmp_path / "two"), "--out", str(tmp_path / "out"), "--val-share", "0.5"])
    names = [Path(name).suffix for name, _, _ in tar_members(tmp_path / "out" / "two-train-0000.tar", {})]
    assert names.count(".jpg") == 4
