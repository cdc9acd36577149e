"""Which names others may give to files, and how much JSON; where a link leads."""

import os
import pwd
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.matrix.cells import make_matrix
from toolkit import files
from toolkit.builder.process import run_folder
from toolkit.cli import parse
from toolkit.config import Config
from toolkit.dist import World
from toolkit.files import (
    UnsafeNameError,
    check_name,
    inside,
    locked,
    read_json,
    refuse_links_out,
    replacing,
    write_atomically,
)
from toolkit.log import printable

GOOD = [
    "a",
    "a.tar",
    "part/a.tar",
    "a/b/c",
    "./a",
    "a/./b",
    "..a",
    "a..b",
    ".hidden",
    "a-b",
    "a b",
    "é",
    "a;b",
    "a'$(b)",
]
BAD = ["", ".", "..", "/", "/a", "//a", "../a", "a/..", "a/../b", "a/../../b", "a//b", "a/", "a/.", "-a", "--output"]
BAD += ["a\\b", "..\\a", "C:\\a", "a\0b", "a\nb", "a\rb", "a\tb", "a\x1b[2Jb", "a\x7f", "a\x85b", "a\u2028b", "\ud800"]
BAD += [None, 7, 1.5, True, b"a", ["a"], {"a": 1}]


@pytest.mark.parametrize("name", GOOD)
def test_names_below_a_folder_are_taken_as_they_are(tmp_path, name):
    assert check_name(name, "x") == name
    assert inside(tmp_path, name, "x") == tmp_path / name


@pytest.mark.parametrize("name", BAD, ids=repr)
def test_any_other_name_is_an_error_of_one_line_that_shows_it(tmp_path, name):
    for check in (lambda: check_name(name, "the shard"), lambda: inside(tmp_path, name, "the shard")):
        with pytest.raises(UnsafeNameError) as caught:
            check()
        assert str(caught.value).startswith(f"the shard {name!r} is not a plain name")
        assert str(caught.value).isprintable()


def test_halves_of_surrogate_pairs_are_taken_where_they_stand_for_a_byte():
    for code in range(0xD7FF, 0xE001):
        try:
            taken = check_name(chr(code), "x").encode("utf-8", "surrogateescape")
        except UnsafeNameError:
            with pytest.raises(UnicodeEncodeError):
                chr(code).encode("utf-8", "surrogateescape")
        else:
            assert taken


def test_an_endless_name_is_not_shown_whole():
    with pytest.raises(UnsafeNameError) as caught:
        check_name("../" * 1_000_000, "x")
    assert len(str(caught.value)) < 500


@given(st.one_of(st.text(), st.lists(st.sampled_from(["..", ".", "", "a", "-", "\\", "\n"]), max_size=6).map("/".join)))
def test_a_name_that_is_taken_stays_below_its_folder(name):
    try:
        check_name(name, "x")
    except UnsafeNameError:
        return
    path = os.path.normpath(os.path.join("/folder", name))
    assert path.startswith("/folder/")
    assert not name.startswith("-")
    assert not any(unicodedata.category(letter) == "Cc" or letter == "\\" for letter in name)


def test_a_link_that_leads_out_is_followed_and_refused(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "folder-2"
    folder.mkdir()
    other.mkdir()
    (folder / "real").touch()
    for name, target in {"near": "real", "out": "../folder-2", "chain": "out", "loop": "loop", "up": ".."}.items():
        (folder / name).symlink_to(target)
    assert inside(folder, "near", "x").exists()
    for name in ("out", "out/a", "chain", "chain/a", "up", "up/folder-2/a"):
        with pytest.raises(UnsafeNameError, match=r"leads out of .* by a link"):
            inside(folder, name, "x")
    with pytest.raises(UnsafeNameError, match=r"'(out|chain|up)' leads out"):
        refuse_links_out(folder)
    (tmp_path / "by-link").symlink_to(folder)
    assert inside(tmp_path / "by-link", "near", "x")  # the folder itself may be reached by one


def test_locks_and_whole_files_are_not_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_bytes(b"mine")
    (tmp_path / "a.lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "a"):
        pass
    with replacing(tmp_path / "a") as temporary:
        planted = temporary.name
        temporary.touch()
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to(precious)
    (tmp_path / planted).symlink_to(precious)  # the same process, thread and name again
    write_atomically(tmp_path / "a", "new")
    assert precious.read_bytes() == b"mine"
    assert (tmp_path / "a").read_text() == "new"


def test_a_whole_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "a.safetensors") as temporary:
        temporary.unlink()
        temporary.touch(0o600)  # as safetensors makes its files
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_is_read_whole_or_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, "é"]}')
    assert read_json(path) == {"a": [1, "é"]}
    for content in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"9" * 9_999):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.json is not JSON"):
            read_json(path)
    monkeypatch.setattr("toolkit.files.JSON_LIMIT_BYTES", 10)
    path.write_bytes(b" " * 9 + b"1")
    assert read_json(path) == 1
    path.write_bytes(b" " * 10 + b"1")
    with pytest.raises(ValueError, match="more than 10 bytes of JSON"):
        read_json(path)


@pytest.mark.parametrize("name", ["../up", "/abs", "a/../../b", "a\\b", "a\nb"])
def test_an_experiment_is_named_below_the_output_before_anything_is_written(tmp_path, capsys, name):
    with pytest.raises(SystemExit) as caught:
        parse(["--output", str(tmp_path / "runs"), "--experiment", name])
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"train.py: error: --experiment {name!r} is not a plain name")
    assert line.count("\n") == 1
    with pytest.raises(UnsafeNameError):
        Config(experiment=name)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"experiment: {name!r}\n" if name.isprintable() and "\\" not in name else 'experiment: "a\\nb"\n')
    with pytest.raises(SystemExit):
        parse(["-c", str(recipe)])
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("link", ["", "train.log", ".lock", "tb", "checkpoints", "checkpoints/step-00000010"])
def test_a_run_does_not_go_on_through_a_link_that_leads_out(tmp_path, link):
    """A run folder from elsewhere may hold links where a run writes and deletes."""
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "runs" / "x"
    (folder / link).parent.mkdir(parents=True)
    (folder / link).symlink_to(tmp_path / "elsewhere") if link else folder.symlink_to(tmp_path / "elsewhere")
    config = parse(["--output", str(tmp_path / "runs"), "--experiment", "x", "--resume", "auto"])
    with pytest.raises(UnsafeNameError, match=r"leads out of .* by a link"):
        run_folder(config, "sgd", {}, World())
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("change", [{"name": "../up"}, {"name": 7}, {"cells": [{"opt": "sgd", "aa": "a\nb"}]}])
def test_a_matrix_names_its_folders_below_runs(change):
    recipe = str(Path(__file__).parents[2] / "launch" / "recipes" / "digits.yaml")
    content = {"name": "m", "recipe": recipe, "seeds": [0], "cells": [{"opt": "sgd"}]}
    assert len(make_matrix(content, "m.yaml").cells) == 1
    with pytest.raises(UnsafeNameError):
        make_matrix(content | change, "m.yaml")


def test_a_terminal_is_shown_escapes_and_does_not_obey_them():
    assert printable("a\x1b]0;b\x07\x9b2J\u202ed\n\tcé") == "a\\x1b]0;b\\x07\\x9b2J\\u202ed\n\tcé"


@pytest.fixture
def no_home(tmp_path, monkeypatch):
    """A user by number alone: no HOME, no line in passwd."""

    def unknown(uid):
        raise KeyError(uid)

    files._homeless_cache.cache_clear()
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path / f"adamwprune-toolkit-{os.getuid()}"


def test_without_a_home_the_cache_is_in_a_folder_of_ones_own(no_home, caplog):
    assert files.cache_folder() == files.cache_folder() == no_home
    assert no_home.stat().st_mode & 0o777 == 0o700
    assert [str(no_home) in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("make", ["open to all", "a link", "another user's"])
def test_without_a_home_a_folder_of_others_is_no_cache(no_home, tmp_path, monkeypatch, make):
    if make == "a link":
        no_home.symlink_to(tmp_path)
    else:
        no_home.mkdir()
        no_home.chmod(0o777 if make == "open to all" else 0o700)
    if make == "another user's":
        uid = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: uid + 1)
        no_home.rename(tmp_path / f"adamwprune-toolkit-{uid + 1}")
    with pytest.raises(ValueError, match=r"is not this user's alone.* set HOME or XDG_CACHE_HOME"):
        files.cache_folder()


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_atomically(tmp_path / "taken", "x")
    assert error.value.filename == str(tmp_path / "taken")
    assert ".tmp" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
