"""A data set behind a URL whose owner means harm: nothing outside the cache is touched, no command is his."""

import os
import time

import pytest
from hostile import change_info, changed_index, rename_shards, snapshot

from toolkit.data import remote
from toolkit.data.index import index_path, load_split
from toolkit.data.remote import fetch, fetch_info, file_url
from toolkit.data.shard_cache import ShardCache, load_remote_split
from toolkit.files import UnsafeNameError

FIRST, SECOND, THIRD = (f"few-train-000{number}.tar" for number in range(3))


@pytest.fixture
def folder(tmp_path):
    """The cache folder; a file of the user's lies beside it."""
    (tmp_path / "precious.tar").write_bytes(b"mine")
    return tmp_path / "cache"


def start(prefix, folder, limit=2**30):
    return load_remote_split(prefix, fetch_info(prefix, folder), "train", folder, limit)


@pytest.mark.parametrize("name", ["{place}/precious.tar", "../precious.tar", "a/../../precious.tar", "a\nb.tar", 7])
@pytest.mark.parametrize("where", ["index", "index without a hash", "info"])
def test_a_shard_name_that_leads_out_is_an_error_that_shows_it(server, folder, name, where):
    name = name.replace("{place}", str(folder.parent)) if isinstance(name, str) else name
    if where == "info":
        change_info(server.folder, lambda info: info["splits"]["train"].update(filenames=[FIRST, name]))
    else:
        rename_shards(server.folder, [FIRST, SECOND, name], in_info=False, hashed=where == "index")
    before = snapshot(folder.parent, folder)
    with pytest.raises(UnsafeNameError) as caught:
        start(server.url, folder)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(folder.parent, folder) == before
    assert server.requests.total() == 1 + (where != "info")  # nothing was asked for twice, and no name of his


@pytest.mark.parametrize("split", ["../precious", "/precious", "a/b", "a\\b", "-x", "a\nb"])
def test_a_split_name_that_leads_out_is_an_error(server, folder, split):
    change_info(server.folder, lambda info: info["splits"].update({split: info["splits"]["train"]}))
    before = snapshot(folder.parent, folder)
    with pytest.raises(ValueError, match="split") as caught:
        start(server.url, folder)
    assert repr(split) in str(caught.value)
    assert snapshot(folder.parent, folder) == before


def test_the_name_inside_a_splits_entry_is_not_a_path(server, folder):
    change_info(server.folder, lambda info: info["splits"]["train"].update(name="../../precious"))
    before = snapshot(folder.parent, folder)
    start(server.url, folder)
    assert (folder / "train.index.safetensors").is_file()
    assert snapshot(folder.parent, folder) == before


@pytest.mark.parametrize("name", ["a.tar; touch x.tar", "$(touch x).tar", "a'; touch x; '.tar", "a b.tar", "~/a.tar"])
@pytest.mark.parametrize("command", ["cat {}/{{}}", "cat '{}/{{}}'", 'sh -c "cat {}/{{}}"', "cat {}"])
def test_no_name_reaches_the_shell_of_a_pipe(server, folder, monkeypatch, name, command):
    """Refused, not quoted: the command may have quotes of its own around the name, or a second shell behind it."""
    monkeypatch.chdir(folder.parent)
    rename_shards(server.folder, [FIRST, SECOND, name])
    before = snapshot(folder.parent, folder)
    with pytest.raises(UnsafeNameError, match="holds what a shell would read") as caught:
        start("pipe:" + command.format(server.folder), folder)
    assert repr(name) in str(caught.value)
    assert snapshot(folder.parent, folder) == before


@pytest.mark.parametrize(
    "name", ["a'b $(touch x) `touch x` ; touch x.tar", "a::file:{place}/precious.tar", "a*?[1].tar"]
)
def test_a_name_in_a_bucket_is_no_command_chain_or_pattern(server, folder, monkeypatch, name):
    """Of a chain fsspec would open the other end, of a pattern the first that fits."""
    monkeypatch.chdir(folder.parent)
    name = name.replace("{place}", str(folder.parent))
    path = server.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (server.folder / THIRD).rename(path)
    rename_shards(server.folder, [FIRST, SECOND, name])
    _, cache = start(f"file://{server.folder}", folder)
    assert os.pread(cache.open(2), 2**20, 0) == path.read_bytes()
    assert (folder.parent / "precious.tar").read_bytes() == b"mine"
    assert not [path for path in folder.parent.rglob("x*") if path.name in ("x", "x.tar")]


def test_odd_names_are_escaped_in_urls(server, folder):
    name = "part/a b#c?d%2e%2e[1-3]{x}.tar"
    (server.folder / "part").mkdir()
    (server.folder / THIRD).rename(server.folder / name)
    rename_shards(server.folder, [FIRST, SECOND, name])
    _, cache = start(server.url, folder)
    assert os.pread(cache.open(2), 2**20, 0) == (server.folder / name).read_bytes()
    assert server.requests[name] == 1
    assert file_url("gs://bucket/{}?x", "a b.tar") == "gs://bucket/a b.tar?x"  # fsspec takes it as it is


def test_the_cache_deletes_only_what_it_made(server, folder):
    own = [folder / name for name in ("mine.tar", "part/mine.tar", "mine.tar.1.2.tmp", "mine.1.2.room", "mine.txt")]
    sizes = load_split(server.folder, "train").shard_bytes
    _, cache = start(server.url, folder, 2 * max(sizes))
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"the user's")
        os.utime(path, (0, 0))  # by age the first to go
    for shard in (0, 1, 2, 0, 1, 2):
        cache.open(shard)
    assert len(list(folder.glob("few-train-*.tar"))) == 2
    assert all(path.read_bytes() == b"the user's" for path in own)
    rename_shards(server.folder, [FIRST, SECOND, "mine.tar"])
    with pytest.raises(ValueError, match=r"mine\.tar was not fetched by this cache; move it away"):
        start(server.url, folder)
    assert all(path.read_bytes() == b"the user's" for path in own)


def test_a_folder_with_other_files_is_no_cache(server, folder):
    folder.mkdir()
    (folder / "_info.json").write_text("mine")
    before = snapshot(folder, folder / "none")
    with pytest.raises(ValueError, match="cache holds other files; name a folder of its own"):
        start(server.url, folder)
    assert snapshot(folder, folder / "none") == before


@pytest.mark.parametrize("link", [SECOND, "part"])
def test_a_link_in_the_cache_is_not_followed_out(server, folder, link):
    if link == "part":
        rename_shards(server.folder, [f"part/{name}" for name in (FIRST, SECOND, THIRD)])
    fetch_info(server.url, folder)
    (folder.parent / "elsewhere").mkdir()
    (folder / link).symlink_to(folder.parent / ("elsewhere" if link == "part" else "precious.tar"))
    before = snapshot(folder.parent, folder)
    with pytest.raises(UnsafeNameError, match=r"leads out of .* by a link"):
        start(server.url, folder)
    assert snapshot(folder.parent, folder) == before


@pytest.mark.parametrize("name", ["start", "room", "_info.json", "train.index.safetensors", "a.tar.lock", ".tar"])
def test_a_shard_does_not_take_the_place_of_the_caches_own_files(server, folder, name):
    rename_shards(server.folder, [FIRST, SECOND, name])
    with pytest.raises(ValueError, match=r"does not end in \.tar"):
        start(server.url, folder)


def test_names_are_checked_again_where_they_become_paths(few_digits, folder):
    index = changed_index(few_digits, names=("../precious.tar",) * 3)
    cache = ShardCache("http://127.0.0.1:9/x", index, 2**30)
    with pytest.raises(UnsafeNameError):
        cache.open(0)


@pytest.mark.parametrize("name", ["_info.json", "train.index.safetensors", SECOND])
def test_more_than_was_expected_is_cut_off_whatever_was_announced(server, folder, monkeypatch, name):
    """The server announces 10 TB and sends for ever."""
    monkeypatch.setattr(remote, "INDEX_LIMIT_BYTES", 2**20)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(fetch, "__defaults__", (2,))
    server.faults = {name: ["endless"] * 2}
    begin_s = time.monotonic()

    def first_images():
        _, cache = start(server.url, folder)
        cache.open(1)

    with pytest.raises(ValueError, match=rf"{name} could not be fetched in 2 tries.*more came than the \d+ bytes"):
        first_images()
    assert time.monotonic() - begin_s < 60
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 2**20


def test_shards_without_an_index_are_cut_off_at_the_caches_size(server, folder, monkeypatch):
    monkeypatch.setattr(fetch, "__defaults__", (1,))
    index_path(server.folder, "train").unlink()
    change_info(server.folder, lambda info: info["splits"]["train"].pop("index_sha256"))
    server.faults = {FIRST: ["endless"]}
    with pytest.raises(ValueError, match="more came than the 1000000 bytes"):
        start(server.url, folder, limit=1_000_000)
