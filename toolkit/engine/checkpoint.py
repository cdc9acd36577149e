"""Checkpoints that are whole or not there: written to a temporary folder, synced, marked complete, renamed.

Only then are older ones removed. The newest complete one is what `--resume auto` takes. One format for all engines:
`tensors/` holds whole, parameter-shaped tensors by name (torch.distributed.checkpoint with safetensors files), state.pt
the rest, read with `weights_only=True`: a checkpoint cannot run code. (torch.distributed.checkpoint's own file format
keeps its index as a pickle, which can.)
"""

import contextlib
import io
import json
import pickle
import re
import shutil
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from toolkit.dist import World
from toolkit.files import inside, read_json, sync_to_disk, write_json
from toolkit.log import get_logger
from toolkit.memory.ledger import storage_key

_STATE, _TENSORS, _COMPLETE, _BEST = "state.pt", "tensors", "COMPLETE", "best.json"
_NAME = re.compile("step-[0-9]+")


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
    return _read_mark(path)[0]


def _read_mark(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(identity, file -> checksum) by a checkpoint's mark. Raises ValueError for other shapes and unsafe names."""
    mark = read_json(path / _COMPLETE)
    identity, files = (mark.get("identity"), mark.get("files", {})) if isinstance(mark, dict) else (None, None)
    if not isinstance(identity or {}, dict) or not isinstance(files, dict):
        raise ValueError(f"{path / _COMPLETE} is not the mark of a checkpoint; take another one")
    for name in files:
        inside(path, name, f"{path / _COMPLETE}: file")
    return identity or {}, files


def discard_after(folder: Path, step: int) -> list[str]:
    """Remove checkpoints later than `step`, from which a run that resumes there departs. Returns their names."""
    later = [path for path in complete_checkpoints(folder) if step_of(path) > step]
    for path in later:
        shutil.rmtree(path)
    return [path.name for path in later]


def damage_of(path: Path) -> str | None:
    """What is wrong with a complete checkpoint's files, None where they are as they were written."""
    try:
        for name, checksum in _read_mark(path)[1].items():
            if not stat.S_ISREG((path / name).stat().st_mode) or _checksum(path / name) != checksum:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint folder: state.pt, with the tensors under `model`, `ema` and `optimizer.state` by name.

    Raises ValueError where it is not a complete one, or holds what could run code or take more memory than its files.
    """
    state = load_state(path)
    for key, tensor in _read_tensors(path / _TENSORS).items():
        kind, _, name = key.partition(".")
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
    metadata: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    claimed = sum(facts.size.numel() * facts.properties.dtype.itemsize for facts in metadata.values())
    stored = sum(inside(folder, path.name, f"{folder}:").stat().st_size for path in folder.glob("*.safetensors"))
    if claimed > stored:  # parts of a tensor may say where in it they lie
        raise ValueError(
            f"{folder} claims {claimed:,} bytes of tensors in files of {stored:,}; take another checkpoint"
        )
    tensors = {key: torch.empty(facts.size, dtype=facts.properties.dtype) for key, facts in metadata.items()}
    with _quiet():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    seen: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():  # safetensors takes contiguous tensors that share no memory
        tensor = tensor.contiguous()
        shares = storage_key(tensor) in seen or tensor.untyped_storage().nbytes() != tensor.nbytes
        apart[key] = tensor.clone() if shares else tensor
        seen.add(storage_key(tensor))
    with _quiet():
        dcp.save(apart, storage_writer=HuggingFaceStorageWriter(str(folder)), no_dist=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One process reads and writes, on purpose; torch warns of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save_checkpoint(
    folder: Path,
    state: dict[str, Any],
    step: int,
    *,
    world: World,
    history: int,
    tensors: Mapping[str, Tensor] | None = None,
    identity: dict[str, Any] | None = None,
    metric: float | None = None,
    best: bool = False,
) -> bool:
    """Write `step-<step>/` below `folder`; keep the newest `history` (one at least) and the best.

    Call on all ranks; rank 0 writes, its `state` counts. Where the disk refuses, the earlier checkpoints stay, the log
    says so, and False is returned on all ranks.
    """
    written = True
    if world.is_main:
        facts = {"step": step, "metric": metric, "identity": identity}
        try:
            final = _write(folder, state, tensors or {}, step, facts)
            if best:
                write_json(folder / _BEST, {"checkpoint": final.name, "metric": metric})
            sync_to_disk(folder)
            _prune(folder, max(1, history))
        except (OSError, dcp.api.CheckpointException) as error:
            refusal, written = _refusal_of_the_disk(error), False
            shutil.rmtree(folder / f"tmp-{step:08d}", ignore_errors=True)
            kept = newest_checkpoint(folder)
            get_logger().error(
                "the checkpoint of step %d could not be written (%s); %s",
                step,
                refusal,
                f"{kept.name} stays the newest" if kept else "there is none yet",
            )
    return all(world.gather(written))


def _write(
    folder: Path, state: dict[str, Any], tensors: Mapping[str, Tensor], step: int, facts: dict[str, Any]
) -> Path:
    final, temporary = folder / f"step-{step:08d}", folder / f"tmp-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    content = io.BytesIO()  # written in one go: torch's own writer does not say that a disk is full
    torch.save(state, content)
    (temporary / _STATE).write_bytes(content.getbuffer())
    if tensors:
        _write_tensors(temporary / _TENSORS, tensors)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    sums = {str(path.relative_to(temporary)): _checksum(path) for path in files}
    (temporary / _COMPLETE).write_text(json.dumps({**facts, "files": sums}) + "\n")
    for path in (*temporary.rglob("*"), temporary):
        sync_to_disk(path)
    if final.exists():  # out of the way whole: a half-removed folder must not look complete
        final.rename(folder / f"tmp-old-{step:08d}")
    temporary.rename(final)
    return final


def _prune(folder: Path, history: int) -> None:
    best = best_checkpoint(folder)
    for path in complete_checkpoints(folder)[:-history]:
        if path != best:
            shutil.rmtree(path)
    for path in folder.glob("tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _refusal_of_the_disk(error: OSError | dcp.api.CheckpointException) -> OSError:
    """The OSError in it; torch.distributed.checkpoint wraps what each rank raised. Anything else is raised."""
    inner = error if isinstance(error, OSError) else next(iter(error.failures.values()))[0]
    if not isinstance(inner, OSError):
        raise inner
    return inner
