"""hf://datasets/OWNER/NAME: shards from a Hugging Face Hub on this host, by huggingface_hub itself."""

import json
import shutil
import subprocess

import pytest
from hostile import rename_shards, snapshot
from http_server import Server
from huggingface_hub import HfFileSystem, constants
from test_remote import LIMIT, batches, same

from toolkit.data import remote
from toolkit.data.index import index_path, load_split
from toolkit.data.remote import RefusedError, fetch_info, file_url
from toolkit.data.shard_cache import load_remote_split
from toolkit.files import UnsafeNameError

PREFIX = "hf://datasets/few/digits"


class Hub(Server):
    """Has one repository, datasets/few/digits, whose shards lie at another host; `status` and `code` refuse it."""

    def __init__(self, folder):
        super().__init__(folder)
        self.status, self.code, self.asked = 200, "", []
        self.http.RequestHandlerClass.do_HEAD = lambda handler: self.answer(handler)

    def answer(self, handler):
        token, host = handler.headers.get("Authorization"), handler.headers["Host"].partition(":")[0]
        self.asked.append((host, token, handler.path))
        _, at_hub, name = handler.path.partition("/datasets/few/digits/resolve/main/")
        _, stored, there = handler.path.partition("/stored/")
        about = handler.path.startswith("/api/datasets/few/digits")
        if self.status != 200 and not (about and self.code == "GatedRepo"):  # what is gated is known all the same
            self._reply(handler, self.status, {"X-Error-Code": self.code})
        elif about:
            self._reply(handler, 200, {}, b'{"id": "few/digits"}')
        elif at_hub and handler.command == "HEAD":
            place = {"Location": f"http://localhost:{self.http.server_port}/stored/{name}"}
            self._reply(handler, *((302, place) if name.endswith(".tar") else (200, {})))
        elif at_hub or stored:
            handler.path = f"/data/{name or there}"
            super().answer(handler)
        else:
            self._reply(handler, 404, {"X-Error-Code": "RepoNotFound"})

    def _reply(self, handler, status, headers, body=b""):
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(body)), "ETag": "x", **headers}.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(body)


@pytest.fixture
def hub(few_digits, tmp_path, monkeypatch, webdataset):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    made = Hub(shutil.copytree(few_digits, tmp_path / "hub"))
    url = f"http://127.0.0.1:{made.http.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    HfFileSystem.clear_instance_cache()
    yield made
    made.http.shutdown()


def open_train(folder, prefix=PREFIX):
    return load_remote_split(prefix, fetch_info(prefix, folder), "train", folder, LIMIT)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("prefix", [PREFIX, f"{PREFIX}@main/"])
def test_batches_are_those_of_a_local_folder(hub, few_digits, tmp_path, workers, prefix):
    index, cache = open_train(tmp_path / "cache", prefix)
    assert same(batches(index, cache, workers), batches(load_split(few_digits, "train"), None))


def test_shards_in_timms_layout_are_fetched_to_make_an_index(hub, few_digits, tmp_path):
    """As of timm/imagenet-1k-wds: shards, and an `_info.json` that knows no index."""
    index_path(hub.folder, "train").unlink()
    info = json.loads((hub.folder / "_info.json").read_text())
    del info["splits"]["train"]["index_sha256"]
    (hub.folder / "_info.json").write_text(json.dumps(info))
    index, _ = open_train(tmp_path / "cache")
    assert index.fingerprint == load_split(few_digits, "train").fingerprint


@pytest.mark.parametrize("fault", ["error", "short", "lie", "page"])
def test_a_fault_costs_a_retry_and_no_sample(hub, few_digits, tmp_path, fault):
    hub.faults = {name: [fault, fault] for name in (*load_split(few_digits, "train").names, "_info.json")}
    index, cache = open_train(tmp_path / "cache")
    assert same(batches(index, cache), batches(load_split(few_digits, "train"), None))


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (
            403,
            "GatedRepo",
            "the repository is gated; ask for access on its page of huggingface.co, then log in: hf auth",
        ),
        (404, "RepoNotFound", "no such repository or revision, or not for you; check the name"),
        (404, "RevisionNotFound", "no such repository or revision, or not for you; check the name"),
        (401, "", "no such repository or revision, or not for you; check the name"),
    ],
)
def test_a_repository_that_is_not_given_is_one_line_at_once(hub, tmp_path, status, code, words):
    hub.status, hub.code = status, code
    with pytest.raises(RefusedError) as refused:
        fetch_info(PREFIX, tmp_path / "cache")
    assert str(refused.value).startswith(f"{PREFIX}/_info.json: {words}")
    assert "\n" not in str(refused.value)
    assert sum("few/digits" in path for _, _, path in hub.asked) <= 2  # not asked again


def test_train_says_so_in_one_line(hub, flags, tmp_path, capsys):
    import train

    hub.status, hub.code = 403, "GatedRepo"
    assert train.main([*flags, "--data-dir", PREFIX, "--shard-cache", str(tmp_path / "cache")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "the repository is gated" in line


@pytest.mark.parametrize("name", ["../../other/data/resolve/main/x.tar", "/datasets/other/data/x.tar"])
def test_a_name_that_leads_out_is_refused(hub, tmp_path, name):
    rename_shards(hub.folder, ["few-train-0000.tar", "few-train-0001.tar", name])
    before = snapshot(tmp_path, tmp_path / "cache")
    with pytest.raises(UnsafeNameError):
        open_train(tmp_path / "cache")
    assert snapshot(tmp_path, tmp_path / "cache") == before


@pytest.mark.parametrize("name", ["x@main", "@main/x.tar", "a/b@refs/pr/1/x.tar", "%2e%2e/x.tar", "x.tar?y#z"])
@pytest.mark.parametrize("prefix", [PREFIX, f"{PREFIX}@main"])
def test_no_name_leads_to_another_repository(hub, tmp_path, name, prefix):
    """Whatever stands in a name is looked up in the repository and revision that the user named, as it is."""
    (hub.folder / name).parent.mkdir(parents=True, exist_ok=True)
    (hub.folder / name).write_text("{}")
    remote.fetch(file_url(prefix, name), tmp_path / "found", lambda path: None, attempts=1)
    assert (tmp_path / "found").read_text() == "{}"
    mine = ("/api/datasets/few/digits", "/datasets/few/digits/resolve/main/", "/stored/", "/api/agent-harnesses")
    assert all(path.startswith(mine) for _, _, path in hub.asked)


def test_the_token_goes_to_the_hub_and_into_no_command(hub, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a command was started")

    monkeypatch.setattr(subprocess, "Popen", refused)
    _, cache = open_train(tmp_path / "cache")
    cache.open(0)
    shown = {(host, token) for host, token, path in hub.asked if "few" in path}
    assert shown == {("127.0.0.1", "Bearer hf_mine"), ("localhost", None)}


def test_a_hub_out_of_reach_is_one_line(hub, tmp_path):
    hub.http.shutdown()
    hub.http.server_close()
    with pytest.raises(ValueError, match=r"_info\.json could not be fetched in 6 tries.*ConnectError") as error:
        fetch_info(PREFIX, tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_buckets_are_refused(tmp_path, webdataset):
    with pytest.raises(RefusedError, match="buckets are not read; name a repository"):
        fetch_info("hf://buckets/few/digits", tmp_path / "cache")
