"""Checkpoints that are whole or not there: written to a temporary folder, synced, marked complete, renamed.

Only then are older ones removed. The newest complete one is what `--resume auto` takes. One format for all engines:
`tensors/` holds tensors by name in safetensors files, each rank's part of those that are cut in files of its own, flat
(their shapes are in the mark), with the places that torch.distributed.checkpoint's reader goes by. state.pt has the
rest, read with `weights_only=True`: a checkpoint cannot run code. (torch.distributed.checkpoint's own file format
keeps its index as a pickle, which can.)
"""

import io
import json
import pickle
import re
import shutil
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from toolkit.dist import World
from toolkit.engine.shard import Shard
from toolkit.errors import blaming
from toolkit.files import inside, read_json, replacing, sync_to_disk, write_json
from toolkit.log import get_logger

T = TypeVar("T")

_STATE, _TENSORS, _COMPLETE, _BEST = "state.pt", "tensors", "COMPLETE", "best.json"
_NAME = re.compile("step-[0-9]+")
_FILE_BYTES = 2**26  # of tensors in a file, but for one that is larger; a rank has one file's on the host at a time


def random_state(device: torch.device) -> dict[str, Any]:
    """torch's generators on this rank. Python's and NumPy's are seeded anew wherever they are used."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(states: list[dict[str, Any]], world: World) -> None:
    """Set this rank's generators; says so where the checkpoint knows fewer ranks."""
    if world.rank >= len(states):
        get_logger().warning("the checkpoint holds no random state for rank %d; dropout starts anew there", world.rank)
        return
    torch.set_rng_state(states[world.rank]["cpu"])
    if world.device.type == "cuda" and "cuda" in states[world.rank]:
        torch.cuda.set_rng_state(states[world.rank]["cuda"], world.device)


def step_of(folder: Path) -> int:
    """Optimizer updates behind a checkpoint folder, by its name."""
    return int(folder.name.removeprefix("step-"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (path.parent for path in folder.glob(f"step-*/{_COMPLETE}"))
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    return max(complete_checkpoints(folder), key=step_of, default=None)


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the best epoch so far, by best.json, or None. Raises ValueError where that names none."""
    if not (folder / _BEST).is_file():
        return None
    best = read_json(folder / _BEST)
    return inside(folder, best.get("checkpoint") if isinstance(best, dict) else None, f"{folder / _BEST}: checkpoint")


def read_identity(path: Path) -> dict[str, Any]:
    """What a checkpoint says it belongs to. Raises ValueError where the folder is not a complete checkpoint."""
    if not (path / _COMPLETE).is_file() or not _NAME.fullmatch(path.name):
        raise ValueError(f"{path} is not a complete checkpoint, a step-<number> folder; --resume auto finds the newest")
    return dict(_read_mark(path)["identity"])


def _read_mark(path: Path) -> dict[str, dict[str, Any]]:
    """A checkpoint's identity, files (with checksums) and shapes of cut tensors, by its mark.

    Raises ValueError for other content and unsafe names.
    """
    mark = read_json(path / _COMPLETE)
    found = {key: mark.get(key) or {} for key in ("identity", "files", "shapes")} if isinstance(mark, dict) else {}
    if not found or not all(isinstance(part, dict) for part in found.values()):
        raise ValueError(f"{path / _COMPLETE} is not the mark of a checkpoint; take another one")
    for name in found["files"]:
        inside(path, name, f"{path / _COMPLETE}: file")
    return found


def discard_after(folder: Path, step: int) -> list[str]:
    """Remove checkpoints later than `step`, from which a run that resumes there departs. Returns their names."""
    later = [path for path in complete_checkpoints(folder) if step_of(path) > step]
    for path in later:
        shutil.rmtree(path)
    return [path.name for path in later]


def damage_of(path: Path) -> str | None:
    """What is wrong with a complete checkpoint's files, None where they are as they were written."""
    try:
        for name, checksum in _read_mark(path)["files"].items():
            if not stat.S_ISREG((path / name).stat().st_mode) or _checksum(path / name) != checksum:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint folder: state.pt, with the tensors under `model`, `ema` and `optimizer.state` by name.

    Raises ValueError where it is not a complete one, or holds what could run code or take more memory than its files.
    """
    state, shapes = load_state(path), _read_mark(path)["shapes"]
    for key, tensor in _read_tensors(path / _TENSORS).items():
        kind, _, name = key.partition(".")
        if key in shapes:
            with blaming(f"{path / _COMPLETE}: the shape of {key} does not fit", "take another checkpoint"):
                tensor = tensor.view(shapes[key])
        if kind == "optimizer":
            state_key, _, name = name.partition(".")
            state["optimizer"]["state"].setdefault(name, {})[state_key] = tensor
        else:
            state[kind][name] = tensor
    return state


def load_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds beside its tensors. Raises ValueError as `load_checkpoint` does."""
    read_identity(path)
    file = inside(path, _STATE, f"{path}:")
    try:
        with zipfile.ZipFile(file) as parts:  # torch stores them as they are; packed, little could become much
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise ValueError(f"{file} is compressed, as no checkpoint of this toolkit is; take another one")
        return dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{file} holds more than plain values (weights_only refuses it): {reason}") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if not folder.is_dir():
        return {}
    for path in folder.glob("*.safetensors"):
        inside(folder, path.name, f"{folder}:")
    metadata: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for key, facts in metadata.items():  # parts of a tensor say where in it they lie
        claimed, stored = (
            sum(size.numel() for size in sizes) * facts.properties.dtype.itemsize
            for sizes in ([facts.size], [chunk.sizes for chunk in facts.chunks])
        )
        if claimed != stored:
            raise ValueError(
                f"{folder}: {key} claims {claimed:,} bytes of tensors in files of {stored:,}; take another checkpoint"
            )
    tensors = {key: torch.empty(facts.size, dtype=facts.properties.dtype) for key, facts in metadata.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads, on purpose
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def _write_tensors(
    folder: Path, tensors: Iterable[tuple[str, Tensor | Shard]], world: World
) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Write this rank's parts of the tensors. Returns checksums by file, and the whole shapes of what is cut.

    So much as a file holds is on the host at a time; torch.distributed.checkpoint's writer has all of a rank's parts
    there, and twice more as bytes, and takes no parts that begin within a row. Raises OSError.
    """
    sums: dict[str, int] = {}
    shapes: dict[str, list[int]] = {}
    held: dict[str, Tensor] = {}
    places: dict[str, dict[str, list[int]]] = {}
    size_bytes = 0

    def write() -> None:
        file = folder / f"rank{world.rank:05d}-{len(sums):05d}.safetensors"
        try:
            with replacing(file, sync=True) as temporary:
                save_file(_apart(held), temporary, {"DCP_SHARDING_INFO": json.dumps(places)})
        except SafetensorError as error:  # as it calls what the system says
            raise OSError(str(error)) from None
        held.clear()
        places.clear()
        sums[f"{_TENSORS}/{file.name}"] = _checksum(file)

    for key, part in tensors:
        if isinstance(part, Shard):
            shapes[key], values, place = list(part.shape), part.values, [part.start]
        else:
            values, place = part, [0] * part.ndim
        if not (values.numel() if key in shapes else world.is_main):
            continue
        values = values.contiguous().cpu()
        if held and size_bytes + values.nbytes > _FILE_BYTES:
            write()
            size_bytes = 0
        held[key], places[key] = values, {"saved_offsets": place}
        size_bytes += values.nbytes
    if held:
        write()
    return sums, shapes


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, but for copies of those that share memory with another, which safetensors refuses."""
    made, end = {}, 0
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].data_ptr()):
        made[key] = tensor.clone() if tensor.data_ptr() < end else tensor
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return made


def save_checkpoint(
    folder: Path,
    state: dict[str, Any],
    step: int,
    *,
    world: World,
    history: int,
    tensors: Iterable[tuple[str, Tensor | Shard]] = (),
    identity: dict[str, Any] | None = None,
    metric: float | None = None,
    best: bool = False,
) -> bool:
    """Write `step-<step>/` below `folder`; keep the newest `history` (one at least) and the best.

    Call on all ranks. Each writes its shards of `tensors`, all at the same time; of the rest, and of `state`, rank 0's
    count. `state` is written when `tensors` has come to its end. Where a disk refuses, the earlier checkpoints stay,
    the log says so, and False is returned on all ranks.
    """
    temporary, facts = folder / f"tmp-{step:08d}", {"step": step, "metric": metric, "identity": identity}

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / _TENSORS).mkdir(parents=True)

    def finish() -> None:
        sums = {name: checksum for part, _ in written for name, checksum in part.items()}
        final = _complete(temporary, state, folder / f"step-{step:08d}", facts | {"shapes": written[0][1]}, sums)
        if best:
            write_json(folder / _BEST, {"checkpoint": final.name, "metric": metric})
        sync_to_disk(folder)
        _prune(folder, max(1, history))

    try:
        _together(world, begin if world.is_main else None)
        written = _together(world, lambda: _write_tensors(temporary / _TENSORS, tensors, world))
        _together(world, finish if world.is_main else None)
    except OSError as refusal:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = newest_checkpoint(folder)
            get_logger().error(
                "the checkpoint of step %d could not be written (%s); %s",
                step,
                refusal,
                f"{kept.name} stays the newest" if kept else "there is none yet",
            )
        return False
    return True


def _together(world: World, write: Callable[[], T] | None) -> list[T]:
    """What each rank's `write` returned, on all ranks. Raises the OSError of the lowest rank that had one, on all."""
    result: Any = None
    try:
        result = write and write()
    except OSError as error:
        result = error
    results = world.gather(result)
    for one in results:
        if isinstance(one, OSError):
            raise one
    return results


def _complete(temporary: Path, state: dict[str, Any], final: Path, facts: dict[str, Any], sums: dict[str, int]) -> Path:
    """Give a folder with every rank's tensors its state, mark and name."""
    content = io.BytesIO()  # written in one go: torch's own writer does not say that a disk is full
    torch.save(state, content)
    (temporary / _STATE).write_bytes(content.getbuffer())
    files = {_STATE: _checksum(temporary / _STATE), **sums}
    (temporary / _COMPLETE).write_text(json.dumps({**facts, "files": files}) + "\n")
    for path in (temporary / _STATE, temporary / _COMPLETE, temporary / _TENSORS, temporary):
        sync_to_disk(path)
    if final.exists():  # out of the way whole: a half-removed folder must not look complete
        final.rename(final.with_name(f"tmp-old-{final.name}"))
    temporary.rename(final)
    return final


def _prune(folder: Path, history: int) -> None:
    best = best_checkpoint(folder)
    for path in complete_checkpoints(folder)[:-history]:
        if path != best:
            shutil.rmtree(path)
    for path in folder.glob("tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
