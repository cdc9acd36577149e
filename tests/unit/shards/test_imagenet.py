"""The builder, on archives of the real structure made here."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.imagenet import catalogue_of, check_complete, main
from shards.verify import main as verify
from toolkit.data.index import load_split

# Sorted by wnid; the devkit numbers them in another order.
WNIDS = ("n01440764", "n01443537", "n01484850")
DEVKIT_IDS = {"n01484850": 1, "n01440764": 2, "n01443537": 3}
PER_CLASS = 6


def picture(seed, size=(40, 30), kind="JPEG", mode="RGB", **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(7, exif=exif)


ODD = {  # file name -> bytes
    "n01440764_0.JPEG": lambda: picture(1, kind="PNG"),
    "n01440764_1.JPEG": lambda: picture(2, mode="CMYK"),
    "n01440764_2.JPEG": lambda: picture(3) + b"extraneous bytes",
    "n01443537_0.JPEG": rotated,
    "n01443537_1.JPEG": lambda: picture(4, mode="L"),
    "n01484850_0.JPEG": lambda: picture(5, size=(300, 200)),
}


def train_images(wnid):
    names = [f"{wnid}_{number}.JPEG" for number in range(PER_CLASS)]
    return {name: ODD[name]() if name in ODD else picture(zlib.crc32(name.encode())) for name in names}


def validation_images():
    """name -> (bytes, wnid)"""
    return {f"ILSVRC2012_val_{n:08d}.JPEG": (picture(n + 500), WNIDS[n % 3]) for n in range(1, 9)}


def tar_of(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    from scipy.io import savemat

    folder = tmp_path_factory.mktemp("archives")
    inner = {}
    for wnid in reversed(WNIDS):
        tar_of(folder / "inner.tar", train_images(wnid))
        inner[f"{wnid}.tar"] = (folder / "inner.tar").read_bytes()
    (folder / "inner.tar").unlink()
    tar_of(folder / "ILSVRC2012_img_train.tar", inner)
    tar_of(folder / "ILSVRC2012_img_val.tar", {name: data for name, (data, _) in validation_images().items()})
    fields = [("ILSVRC2012_ID", "i4"), ("WNID", "U9"), ("words", "U20"), ("gloss", "U20"), ("num_children", "i4")]
    synsets = [(number, wnid, "fish", "a fish", 0) for wnid, number in DEVKIT_IDS.items()]
    synsets.append((1001, "n00001740", "entity", "all", 3))  # an inner node of WordNet
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(synsets, dtype=fields)})
    truth = "\n".join(str(DEVKIT_IDS[wnid]) for _, wnid in validation_images().values())
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }
    tar_of(folder / "ILSVRC2012_devkit_t12.tar.gz", devkit, "w:gz")
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    for wnid in WNIDS:
        (folder / "train" / wnid).mkdir(parents=True)
        for name, data in train_images(wnid).items():
            (folder / "train" / wnid / name).write_bytes(data)
    for name, (data, wnid) in validation_images().items():
        (folder / "val" / wnid).mkdir(parents=True, exist_ok=True)
        (folder / "val" / wnid / name).write_bytes(data)
    (folder / "train" / WNIDS[0] / "notes.txt").write_text("no image")
    return folder


def build(source, out, *more):
    settings = ["--name", "tiny", "--partial", "--train-shards", "3", "--validation-shards", "2"]
    main(["--source", str(source), "--out", str(out), *settings, *more])
    return out


def samples(folder, split):
    """file name -> (bytes, class number, what .json says), as another library reads them"""
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed; requirements.txt has it")
    found = {}
    for name in load_split(folder, split).names:
        for sample in webdataset.WebDataset(str(folder / name), shardshuffle=False):
            meta = json.loads(sample["json"])
            assert "." not in sample["__key__"]
            found[meta["filename"]] = (sample["jpg"], int(sample["cls"]), meta)
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(".lock")}


def test_archives_and_image_folder_give_the_same_shards(archives, image_folder, tmp_path):
    first = build(archives, tmp_path / "a", "--workers", "1")
    second = build(image_folder, tmp_path / "b", "--workers", "2")
    train, validation = samples(first, "train"), samples(first, "validation")
    assert len(train) == 18
    assert len(validation) == 8
    for wnid in WNIDS:
        for name, data in train_images(wnid).items():
            assert train[name][1] == WNIDS.index(wnid)
            if name not in ("n01440764_0.JPEG", "n01440764_1.JPEG"):  # PNG and CMYK are encoded anew
                assert train[name][0] == data
    for name, (data, wnid) in validation_images().items():
        assert validation[name][:2] == (data, WNIDS.index(wnid))  # and not the devkit's number - 1
        assert DEVKIT_IDS[wnid] - 1 != WNIDS.index(wnid)
    assert samples(second, "validation") == validation
    assert {name: sample[:2] for name, sample in samples(second, "train").items()} == {
        name: sample[:2] for name, sample in train.items()
    }
    assert json.loads((first / "classes.json").read_text()) == list(WNIDS)


def test_png_and_cmyk_become_rgb_jpegs_and_nothing_else_changes(archives, tmp_path):
    train = samples(build(archives, tmp_path / "out"), "train")
    for name in ("n01440764_0.JPEG", "n01440764_1.JPEG"):
        image = Image.open(io.BytesIO(train[name][0]))
        assert (image.format, image.mode) == ("JPEG", "RGB")
        original = np.asarray(Image.open(io.BytesIO(ODD[name]())).convert("RGB"), dtype=float)
        assert np.abs(np.asarray(image, dtype=float) - original).mean() < 8
    assert (train["n01484850_0.JPEG"][2]["width"], train["n01484850_0.JPEG"][2]["height"]) == (300, 200)


def test_bytes_do_not_depend_on_the_number_of_workers(archives, tmp_path):
    assert contents(build(archives, tmp_path / "a", "--workers", "1")) == contents(
        build(archives, tmp_path / "b", "--workers", "3")
    )


def test_the_seed_shuffles(archives, tmp_path):
    first, second = build(archives, tmp_path / "a"), build(archives, tmp_path / "b", "--seed", "1")
    assert contents(first) != contents(second)
    labels = load_split(first, "train").label
    assert labels.tolist() != sorted(labels.tolist())


def test_smaller_images_on_request(archives, tmp_path):
    out = build(archives, tmp_path / "out", "--max-short", "100", "--max-long", "120")
    data, _, meta = samples(out, "train")["n01484850_0.JPEG"]
    assert Image.open(io.BytesIO(data)).size == (meta["width"], meta["height"]) == (120, 80)
    info = json.loads((out / "_info.json").read_text())
    assert (info["max_short"], info["max_long"], info["quality"]) == (100, 120, 95)


def test_shards_of_others_are_a_source_too(archives, tmp_path):
    first = build(archives, tmp_path / "first")
    again = build(first, tmp_path / "again", "--seed", "5")
    assert sorted(s[:2] for s in samples(again, "train").values()) == sorted(
        s[:2] for s in samples(first, "train").values()
    )
    assert {Path(name).stem for name in samples(again, "train")} == {Path(n).stem for n in samples(first, "train")}


def test_drawn_images_stay_called_synthetic(tmp_path):
    from shards.synthetic import main as synthetic

    synthetic(["--out", str(tmp_path / "drawn"), "--classes", "3", "--images", "12", "--size", "24", "--shards", "2"])
    info = json.loads(
        (build(tmp_path / "drawn", tmp_path / "out", "--validation-shards", "1") / "_info.json").read_text()
    )
    assert info["synthetic"] is True
    assert info["note"].startswith("SYNTHETIC")


def test_a_truncated_image_is_named_and_left_out_only_on_request(image_folder, tmp_path, capsys):
    source = tmp_path / "tree"
    shutil.copytree(image_folder, source)
    broken = source / "train" / WNIDS[2] / f"{WNIDS[2]}_3.JPEG"
    broken.write_bytes(broken.read_bytes()[:-300])
    from shards.dataset import BuildSettings, Cleaning
    from shards.dataset import build as build_shards

    settings = BuildSettings("tiny", 3, 2, 0, Cleaning())
    with pytest.raises(ValueError, match=r"n01484850_3\.JPEG in .*--partial"):
        build_shards(tmp_path / "out", catalogue_of(source), settings, 1)
    assert not (tmp_path / "out" / "_info.json").exists()
    out = build(source, tmp_path / "partial")
    assert "left out: n01484850_3.JPEG" in capsys.readouterr().err
    assert len(load_split(out, "train")) == 17


def test_upper_case_suffixes_and_nested_folders(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            path = tmp_path / "tree" / split / "n01440764" / "more" / f"a.b{number}.JPG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))
    main(
        [
            "--source",
            str(tmp_path / "tree"),
            "--out",
            str(tmp_path / "out"),
            "--partial",
            "--train-shards",
            "1",
            "--validation-shards",
            "1",
        ]
    )
    assert set(samples(tmp_path / "out", "train")) == {"a.b0.JPG", "a.b1.JPG", "a.b2.JPG"}


def test_a_part_of_it_comes_in_shards_of_a_good_size(image_folder, tmp_path):
    main(["--source", str(image_folder), "--out", str(tmp_path / "out"), "--partial", "--workers", "1"])
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {
        "imagenet1k-train-0000.tar",
        "imagenet1k-validation-0000.tar",
    }


def test_incomplete_imagenet_is_refused(archives, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"found 18 training and 8 validation images of 3 classes.*--partial"):
        check_complete(catalogue_of(archives))
    with pytest.raises(SystemExit) as stop:
        main(["--source", str(archives), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "1,281,167" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_data_set_is_not_overwritten(archives, tmp_path, capsys):
    out = build(archives, tmp_path / "out")
    before = contents(out)
    build(archives, out)  # the same again: nothing to do
    assert contents(out) == before
    with pytest.raises(SystemExit):
        build(archives, out, "--seed", "1")
    assert "holds another data set" in capsys.readouterr().err
    assert contents(out) == before


def test_a_killed_build_goes_on_and_ends_byte_identical(tmp_path):
    source, whole = tmp_path / "tree", tmp_path / "whole"
    for split, count in (("train", 240), ("val", 12)):
        for number in range(count):
            path = source / split / WNIDS[number % 3] / f"{split}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number, size=(400, 300)))
    command = [
        "--source",
        str(source),
        "--partial",
        "--train-shards",
        "24",
        "--validation-shards",
        "2",
        "--workers",
        "2",
        "--max-long",
        "320",
    ]
    main([*command, "--out", str(whole)])
    out = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-m", "shards.imagenet", *command, "--out", str(out)],
        cwd=Path(__file__).parents[3],
        start_new_session=True,
    )
    while child.poll() is None and len(list(out.glob("*.tar"))) < 3:
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (out / "_info.json").exists()
    assert len(list(out.glob("*.tar"))) < 26
    main([*command, "--out", str(out)])
    assert contents(out) == contents(whole)


def test_verify_reads_everything_again(archives, tmp_path, capsys):
    out = build(archives, tmp_path / "out")
    verify([str(out), "--workers", "2"])
    index = load_split(out, "train")
    path = out / index.names[int(index.shard[4])]
    data = bytearray(path.read_bytes())
    data[int(index.offset[4]) + 50] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(SystemExit) as stop:
        verify([str(out)])
    assert stop.value.code == 1
    assert "image 4 at byte" in capsys.readouterr().out


def test_timm_reads_the_shards(archives, tmp_path, webdataset):
    from timm.data import create_dataset

    out = build(archives, tmp_path / "out")
    data = create_dataset("wds/", root=str(out), split="validation", is_training=False, batch_size=8)
    assert sum(1 for _ in data) == 8


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "neither ILSVRC2012_img_train.tar nor"),
        (lambda folder: (folder / "train").mkdir(), "lacks train/ and val/"),
        (lambda folder: (folder / "ILSVRC2012_img_train.tar").touch(), "lacks ILSVRC2012_img_val.tar"),
    ],
)
def test_what_is_not_there(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message):
        catalogue_of(tmp_path)
