"""Files behind a URL: fetched whole, checked, tried again; the `_info.json` and the indices of a data set there.

webdataset's `gopen` opens web addresses and `pipe:`, fsspec buckets (s3, gs, az), huggingface_hub finds what is behind
hf://.
A server that stalls, drops the connection or sends something else costs another try with growing pauses; what cannot be
had right is an error, never a sample less. The server may be a stranger's: names are checked before they become part of
a URL, and no more is taken than is expected.
"""

import hashlib
import shlex
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from toolkit.data.index import INDEX_LIMIT_BYTES, ShardIndex, index_path, read_index, scan_shards
from toolkit.data.info import INFO_NAME, read_info
from toolkit.data.tar import scan_shard
from toolkit.files import (
    JSON_LIMIT_BYTES,
    UnsafeNameError,
    cache_folder,
    check_name,
    inside,
    locked,
    read_json,
    replacing,
)
from toolkit.log import get_logger

ATTEMPTS = 6
FIRST_PAUSE_S = 0.5  # doubled after each failed try: 0.5 + 1 + 2 + 4 + 8 s in all
STALL_S = 30.0  # without a byte for so long, a transfer is given up
_PIECE_BYTES = 2**16  # small, so that a slow link is not taken for a stalled one
_BLOCK_BYTES = 2**22  # that fsspec asks a bucket for at a time: its own 50 MB would look like a stall
_BY_FSSPEC = ("abfs", "az", "file", "gcs", "gs", "memory", "oci", "oss", "s3")
_WITH_ESCAPES = ("http", "https", "htgs", "ftps", "sftp", "scp")  # gopen gives these to curl, which reads %20 and globs


def is_remote(data_dir: str) -> bool:
    """Whether --data-dir is a URL prefix."""
    return "://" in data_dir or data_dir.startswith("pipe:")


def file_url(prefix: str, name: str) -> str:
    """The URL of a file: `{}` in the prefix stands for its name, otherwise it comes behind a slash.

    Raises UnsafeNameError for a name that leads elsewhere, and in a `pipe:` command for one that a shell would not take
    literally. (Quotes would not do: the command may have its own around `{}`, or a second shell, as ssh has.)
    """
    check_name(name, f"{prefix}: file")
    scheme = prefix.partition(":")[0]
    if scheme == "pipe" and shlex.quote(name) != name:
        raise UnsafeNameError(
            f"{prefix}: file {name!r} holds what a shell would read; behind pipe: use letters, digits and _-.,:@%+=/"
        )
    part = urllib.parse.quote(name) if scheme in _WITH_ESCAPES else name
    return prefix.replace("{}", part) if "{}" in prefix else f"{prefix.rstrip('/')}/{part}"


class RefusedError(ValueError):
    """The Hugging Face Hub does not give a file to this user, however often it is asked."""


_FOR_GOOD = (UnsafeNameError, RefusedError)  # what no other try would mend


def _open(url: str) -> Any:
    scheme = url.partition(":")[0]
    try:
        if scheme in _BY_FSSPEC:
            import fsspec

            # Not fsspec.open: of a name with :: in it that would make a chain of file systems.
            return fsspec.filesystem(scheme).open(url, "rb", block_size=_BLOCK_BYTES)
        if scheme == "hf":
            return _open_at_hub(url)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the library that asks the Hub or a bucket; its faults are no OSErrors
        raise OSError(f"{type(error).__name__}: {error}") from error
    from webdataset import gopen

    return gopen(url, "rb")


def _open_at_hub(url: str) -> Any:
    # webdataset's own way would show the user's token to all who may list this host's processes, in curl's command.
    from huggingface_hub import HfFileSystem, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if url.startswith("hf://buckets/"):
        raise RefusedError(f"{url}: buckets are not read; name a repository, hf://datasets/OWNER/NAME")
    place: Any = HfFileSystem().resolve_path(url)  # a repository's: buckets are refused above
    asked = hf_hub_url(place.repo_id, place.path_in_repo, repo_type=place.repo_type, revision=place.revision)
    given = get_hf_file_metadata(asked).location  # at the Hub, or signed for whoever stores large files for it
    at_hub = urllib.parse.urlsplit(given)[:2] == urllib.parse.urlsplit(asked)[:2]
    request = urllib.request.Request(given, headers=build_hf_headers() if at_hub else {})
    return urllib.request.urlopen(request, timeout=STALL_S)


def _raise_refusal(url: str, error: BaseException | None) -> None:
    """Raise RefusedError where an error comes from a repository that is gated, private or not there."""
    while url.startswith("hf:") and error is not None:
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if isinstance(error, GatedRepoError):
            raise RefusedError(
                f"{url}: the repository is gated; ask for access on its page of huggingface.co, then log in: "
                "hf auth login"
            )
        forbidden = isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403)
        if forbidden or isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
            raise RefusedError(
                f"{url}: no such repository or revision, or not for you; check the name "
                "(hf://datasets/OWNER/NAME), for a private or gated one log in: hf auth login"
            )
        error = error.__cause__


def _transfer(url: str, target: Path, limit_bytes: int) -> None:
    """Copy a URL to a file. Raises OSError where it ends badly, stalls or goes beyond `limit_bytes`."""
    stream = _open(url)
    process = getattr(stream, "proc", None)
    failed: list[BaseException] = []
    stalled = threading.Event()
    last_s = time.monotonic()

    def copy() -> None:
        nonlocal last_s
        taken_bytes = 0
        try:
            with open(target, "wb") as file:
                while (piece := stream.read(_PIECE_BYTES)) and not stalled.is_set():  # the next try has the file
                    taken_bytes += len(piece)
                    if taken_bytes > limit_bytes:
                        raise OSError(f"more came than the {limit_bytes} bytes expected")
                    file.write(piece)
                    last_s = time.monotonic()
            stream.close()  # raises where the command behind the stream failed
        except BaseException as error:  # raised again below, in the thread that waits
            failed.append(error)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.05)
            if thread.is_alive() and time.monotonic() - last_s > STALL_S:
                stalled.set()
                raise OSError(f"no data for {STALL_S:g} s")
        if failed:
            raise OSError(f"{type(failed[0]).__name__}: {failed[0]}") from failed[0]
    finally:
        if process is not None and process.poll() is None:
            process.kill()  # ends a read in the other thread, and what nobody reads any more
            thread.join(5)


def fetch(
    url: str,
    target: Path,
    check: Callable[[Path], object],
    attempts: int = ATTEMPTS,
    *,
    limit_bytes: int = JSON_LIMIT_BYTES,
) -> None:
    """Bring a URL to `target`, atomically, trying again where the transfer fails or `check` raises ValueError.

    More than `limit_bytes` are not taken, whatever the server announces. Raises ValueError that names the URL and the
    last fault when all tries have failed, at once RefusedError, and UnsafeNameError from `check`.
    """
    fault = ""
    with replacing(target, sync=True) as temporary:
        for attempt in range(1, attempts + 1):
            try:
                _transfer(url, temporary, limit_bytes)
                check(temporary)
                return
            except _FOR_GOOD:
                raise
            except (OSError, ValueError) as error:
                _raise_refusal(url, error)
                fault = " ".join(str(error).split())
                get_logger().warning("%s: try %d of %d failed: %s", url, attempt, attempts, fault)
                if attempt < attempts:
                    time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
        raise ValueError(f"{url} could not be fetched in {attempts} tries, the last fault: {fault}; check the server")


def remote_folder(prefix: str) -> Path:
    """Where the shards of a URL prefix are kept unless told otherwise."""
    return cache_folder() / "shards" / hashlib.sha256(prefix.encode()).hexdigest()[:16]


def _check_scheme(prefix: str) -> None:
    """Raise ValueError where a URL prefix has a scheme that nothing here opens, or a package for it is missing."""
    scheme = prefix.partition(":")[0]
    try:
        import fsspec
        from webdataset.gopen import gopen_schemes

        schemes = {*gopen_schemes, *_BY_FSSPEC, "hf"} - {"__default__"}
        if scheme not in schemes:
            known = ", ".join(sorted(schemes))
            raise ValueError(f"--data-dir {prefix}: the scheme {scheme} is not known; use {known}")
        if scheme in _BY_FSSPEC:
            fsspec.get_filesystem_class(scheme)  # names the package that it wants
    except ImportError as error:
        raise ValueError(
            f"--data-dir {prefix}: {error}; install what {scheme}: needs (docs/data.md), or give a folder"
        ) from None


def fetch_info(prefix: str, folder: Path) -> dict[str, Any]:
    """The `_info.json` behind a URL prefix, fetched anew at each start into the cache folder `folder`.

    Raises ValueError for an unknown scheme, a folder with files that no cache has made, and as `read_info` does.
    """
    _check_scheme(prefix)
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if found and "start.lock" not in found:  # the first file that a cache makes
        raise ValueError(f"--shard-cache {folder} holds other files; name a folder of its own, in which it may delete")
    with locked(folder / "start"):  # the ranks of a host, one after the other
        fetch(file_url(prefix, INFO_NAME), folder / INFO_NAME, read_json)
        return read_info(folder)


def _check_sha256(sha256: str, path: Path) -> None:
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"its bytes are not those {INFO_NAME} was written with")


def remote_index(prefix: str, entry: dict[str, Any], folder: Path, limit_bytes: int) -> ShardIndex:
    """The index of a split, whose entry in `_info.json` is given; shards that have none are fetched once to make one.

    Of these no more than `limit_bytes` stay in `folder`.
    """
    path, names, sha256 = index_path(folder, entry["name"]), entry["filenames"], entry.get("index_sha256")
    check, attempts = (partial(_check_sha256, sha256), ATTEMPTS) if sha256 else (partial(read_index, folder), 3)
    try:
        fetch(file_url(prefix, path.name), path, check, attempts, limit_bytes=INDEX_LIMIT_BYTES)
        return read_index(folder, path)
    except _FOR_GOOD:
        raise
    except ValueError:
        if sha256 is not None:  # there is one, so what came instead is a fault
            raise
        get_logger().warning("%s has no %s: every shard is fetched once to make one", prefix, path.name)
    own = path.with_name(f"scanned-{path.name}")
    if own.is_file() and read_index(folder, own).names == tuple(names):
        return read_index(folder, own)

    def fetched(scan: Callable[[Path], Any], shards: Iterable[Path]) -> Iterator[Any]:
        """As `map`, of shards that are not here yet."""
        total = 0
        for name, shard in zip(names, shards, strict=True):
            inside(folder, name, f"{prefix}: shard")
            with locked(shard):  # the lock beside it says later that this cache has made it
                fetch(file_url(prefix, name), shard, partial(scan_shard, checksums=False), limit_bytes=limit_bytes)
                found = scan(shard)
                total += found[0].st_size
                if total > limit_bytes:
                    shard.unlink()
            yield found

    index = scan_shards(folder, names, checksums=True, run=fetched)
    index.save(own)
    return index
