"""Shards from an HTTP server that stalls, drops, lies and answers with errors."""

import json
import os
import shutil
import sys
import time
from functools import partial

import fsspec
import pytest
import torch

from shards.writer import Sample, write_info, write_split
from toolkit.data import remote
from toolkit.data.decode import EvalTransform, TrainTransform
from toolkit.data.index import index_path, load_split
from toolkit.data.loader import EvalLoader, TrainLoader
from toolkit.data.remote import fetch, fetch_info
from toolkit.data.shard_cache import ShardCache, load_remote_split

SIZE = (16, 16)
LIMIT = 2**30


def open_train(server, folder, limit=LIMIT):
    return load_remote_split(server.url, fetch_info(server.url, folder), "train", folder, limit)


def batches(index, cache, workers=0, window=2):
    loader = TrainLoader(
        index,
        TrainTransform(SIZE),
        SIZE,
        seed=3,
        batch_size=8,
        accumulation=1,
        rank=0,
        num_ranks=1,
        window=window,
        cache=cache,
        workers=workers,
    )
    return [(batch.samples, batch.images, batch.num_bad) for batch in loader.epoch(1)]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2] == 0
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_local_folder(server, few_digits, tmp_path, workers):
    index, cache = open_train(server, tmp_path / "cache")
    assert same(batches(index, cache, workers), batches(load_split(few_digits, "train"), None))


@pytest.mark.parametrize("fault", ["error", "drop", "stall", "short", "lie", "page"])
def test_a_fault_costs_a_retry_and_no_sample(server, few_digits, tmp_path, fault):
    names = load_split(few_digits, "train").names
    server.faults = {name: [fault, fault] for name in (*names, "_info.json")}
    server.faults["train.index.safetensors"] = [fault]
    index, cache = open_train(server, tmp_path / "cache")
    assert same(batches(index, cache), batches(load_split(few_digits, "train"), None))
    assert all(server.requests[name] == 3 for name in names)


def test_what_never_comes_right_is_an_error_that_names_it(server, tmp_path):
    index, cache = open_train(server, tmp_path / "cache")
    server.faults = {index.names[1]: ["lie"] * 20}
    with pytest.raises(ValueError, match=rf"{index.names[1]} could not be fetched in 6 tries.*other bytes"):
        cache.open(1)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    with pytest.raises(ValueError, match=r"nothing\.tar could not be fetched in 2 tries"):
        fetch(f"{server.url}/nothing.tar", tmp_path / "x", lambda path: None, attempts=2)


def test_shards_without_an_index_are_fetched_to_make_one(server, few_digits, tmp_path):
    index_path(server.folder, "train").unlink()
    info = json.loads((server.folder / "_info.json").read_text())
    del info["splits"]["train"]["index_sha256"]
    (server.folder / "_info.json").write_text(json.dumps(info))
    server.faults = {"few-train-0001.tar": ["page", "drop"]}
    index, cache = open_train(server, tmp_path / "cache")
    assert index.fingerprint == load_split(few_digits, "train").fingerprint
    before = server.requests["few-train-0000.tar"]
    open_train(server, tmp_path / "cache")
    assert server.requests["few-train-0000.tar"] == before  # the index was kept
    assert same(batches(index, cache), batches(load_split(few_digits, "train"), None))


def test_the_cache_is_bounded_and_forgets_the_least_recently_used(server, few_digits, tmp_path):
    sizes = load_split(few_digits, "train").shard_bytes
    index, cache = open_train(server, tmp_path / "cache", limit=2 * max(sizes))
    first = cache.open(0)
    time.sleep(0.01)
    cache.open(1)
    time.sleep(0.01)
    cache.open(0)
    time.sleep(0.01)
    cache.open(2)
    assert {path.name for path in (tmp_path / "cache").glob("*.tar")} == {index.names[0], index.names[2]}
    assert same(batches(index, cache, window=1), batches(load_split(few_digits, "train"), None, window=1))
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 2 * max(sizes)
    assert os.pread(first, 10, 0)  # a file that was forgotten stays readable where it is open
    with pytest.raises(ValueError, match="does not hold two shards"):
        ShardCache(server.url, index, max(sizes))


def test_shards_are_fetched_ahead(server, tmp_path):
    _, cache = open_train(server, tmp_path / "cache")
    cache.prefetch(range(3))
    for _ in range(200):
        if len(list((tmp_path / "cache").glob("few-train-*.tar"))) == 3:
            break
        time.sleep(0.02)
    before = dict(server.requests)
    for shard in range(3):
        cache.open(shard)
    assert server.requests == before


def test_evaluation_counts_each_sample_once(server, tmp_path):
    info = fetch_info(server.url, tmp_path / "cache")
    index, cache = load_remote_split(server.url, info, "validation", tmp_path / "cache", LIMIT)
    loader = EvalLoader(index, EvalTransform(SIZE), SIZE, batch_size=7, rank=0, num_ranks=1, cache=cache)
    seen = [int(s) for batch in loader for s, w in zip(batch.samples, batch.weights, strict=True) if w]
    assert seen == list(range(40))


def test_pipe_prefix(few_digits, tmp_path, webdataset):
    prefix = f"pipe:cat {few_digits}/{{}}"
    info = fetch_info(prefix, tmp_path / "cache")
    index, cache = load_remote_split(prefix, info, "train", tmp_path / "cache", LIMIT)
    assert same(batches(index, cache), batches(load_split(few_digits, "train"), None))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_buckets_are_read_by_fsspec(few_digits, tmp_path, webdataset, scheme, workers):
    """By file systems that need no network; workers, which are forked, see what was in memory before."""
    prefix = f"{scheme}://{few_digits}" if scheme == "file" else "memory://bucket/few digits"
    if scheme == "memory":
        fsspec.filesystem("memory").put(f"{few_digits}/", "/bucket/few digits", recursive=True)
    index, cache = load_remote_split(prefix, fetch_info(prefix, tmp_path / "c"), "train", tmp_path / "c", LIMIT)
    assert same(batches(index, cache, workers), batches(load_split(few_digits, "train"), None))


def test_a_fault_of_a_buckets_library_costs_tries_and_is_named(tmp_path, webdataset, monkeypatch):
    class Denied(Exception):
        """As botocore's: no OSError."""

    def refuse(*args, **kwargs):
        raise Denied("no credentials")

    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", refuse)
    with pytest.raises(ValueError, match=r"memory://x/_info.json could not be fetched in 6 tries.*Denied: no cred"):
        fetch_info("memory://x", tmp_path)


def test_shards_made_anew_behind_the_same_url_are_fetched_anew(server, tmp_path):
    index, cache = open_train(server, tmp_path / "cache")
    batches(index, cache)
    first = (server.folder / index.names[0]).read_bytes()
    places = list(zip(index.offset[:30].tolist(), index.size[:30].tolist(), strict=True))
    data = [first[offset : offset + size] for offset, size in reversed(places)]
    samples = [Sample(f"n{i}", i % 10, partial(bytes, image)) for i, image in enumerate(data)]
    splits = json.loads((server.folder / "_info.json").read_text())["splits"]
    splits["train"] = write_split(server.folder, "train", "few", samples, 3)
    write_info(server.folder, "few", 10, splits)
    index, cache = open_train(server, tmp_path / "cache")
    assert all(num_bad == 0 for _, _, num_bad in batches(index, cache))


def test_shards_in_folders(few_digits, tmp_path, webdataset):
    served = tmp_path / "served"
    (served / "part").mkdir(parents=True)
    info = json.loads((few_digits / "_info.json").read_text())
    for name in info["splits"]["train"]["filenames"]:
        shutil.copy(few_digits / name, served / "part" / name)
    del info["splits"]["train"]["index_sha256"]
    info["splits"]["train"]["filenames"] = [f"part/{name}" for name in info["splits"]["train"]["filenames"]]
    (served / "_info.json").write_text(json.dumps(info))
    prefix = f"pipe:cat {served}/{{}}"
    index, cache = load_remote_split(prefix, fetch_info(prefix, tmp_path / "c"), "train", tmp_path / "c", LIMIT)
    shutil.rmtree(tmp_path / "c" / "part")  # made room for others
    assert len(batches(index, cache)) == 12


def test_a_reader_lets_go_of_shards_that_were_forgotten(server, tmp_path):
    from toolkit.data.loader import _Reader

    index, cache = open_train(server, tmp_path / "cache", limit=2 * max(load_split(server.folder, "train").shard_bytes))
    reader = _Reader(index, None, SIZE, 0, cache)
    for sample in (0, 40, 90, 0, 40, 90):
        reader.read(sample)
    assert sum(os.fstat(file).st_nlink == 0 for file in reader._files.values()) <= 1


def test_an_unknown_scheme_is_an_error_at_once(tmp_path, webdataset):
    with pytest.raises(ValueError, match="the scheme gopher is not known"):
        fetch_info("gopher://host/data", tmp_path)


def test_a_bucket_whose_package_is_missing_is_an_error_that_names_it(tmp_path, webdataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"--data-dir s3://bucket/data: Install s3fs to access S3; .*docs/data.md"):
        fetch_info("s3://bucket/data", tmp_path)
