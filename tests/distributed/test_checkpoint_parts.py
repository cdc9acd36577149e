"""A checkpoint of several ranks: each writes what it holds, at no more host memory than that, or there is none."""

import ctypes
import os
import re
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from engines import ENGINES
from flags import vit_flags
from ranks import exit_codes, run_ranks

pytest.importorskip("deepspeed")

from toolkit.builder import build
from toolkit.cli import parse
from toolkit.dist import World
from toolkit.engine.checkpoint import damage_of, load_checkpoint, newest_checkpoint, save_checkpoint
from toolkit.engine.loop import train as train_loop
from toolkit.engine.shard import Shard
from toolkit.engine.snapshot import save_snapshot

LONG = pytest.mark.long


def resident_bytes(which):
    """VmRSS, what there is now, or VmHWM, the most since clear_refs was told 5: by whatever allocator."""
    return 1024 * int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def save_and_measure(rank, engine, flags):
    """(bytes that this rank wrote, bytes that its process took for it beside what it had)."""
    os.environ.update(ENGINES[engine])
    run = build(parse(flags))
    history = train_loop(run)

    def all_reduce(*arguments, **options):
        raise AssertionError("a save brings no tensors together")

    torch.distributed.all_reduce = all_reduce
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be taken again
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    assert save_snapshot(run, history, 1000)
    peak = resident_bytes("VmHWM") - before
    files = (newest_checkpoint(run.folder / "checkpoints") / "tensors").glob(f"rank{rank:05d}-*.safetensors")
    return sum(file.stat().st_size for file in files), peak


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", *(pytest.param(name, marks=LONG) for name in ("zero2", "zero3"))])
def test_a_rank_takes_no_more_host_memory_than_its_parts_and_one_tensor(few_digits, tmp_path, engine):
    """34 MiB each of dense weights, moments and masks, most of which are packed while training."""
    more = ["--model", "vit_tiny_patch16_224", "--global-batch-size", "48", "--epochs", "1", "--prune-frequency", "1"]
    more += ["--opt", "adamwprune", "--sparsity", "0.7", "--experiment", "r"]
    found = run_ranks(save_and_measure, 2, engine, vit_flags(few_digits, tmp_path, *more), join_group=False)
    saved = load_checkpoint(newest_checkpoint(tmp_path / "r" / "checkpoints"))
    moments = [value for state in saved["optimizer"]["state"].values() for value in state.values()]
    whole = sum(tensor.nbytes for tensor in (*saved["model"].values(), *moments))
    tensor_bytes = max(tensor.nbytes for tensor in saved["model"].values())
    for parts_bytes, peak_bytes in found:
        assert parts_bytes == pytest.approx(whole / 2, rel=0.02)
        assert peak_bytes <= parts_bytes + tensor_bytes


def parts(rank, length):
    """A tensor of one value cut over two ranks, [length] on each, and one that both have."""
    yield "model.cut", Shard(torch.Size([2 * length]), rank * length, torch.full((length,), float(length)))
    yield "model.all", torch.full((), float(rank))


def save_with_a_full_disk(rank, folder):
    """Files beyond 1 MiB are refused on rank 1 alone."""
    save = partial(save_checkpoint, folder, {"model": {}}, history=3, world=World(rank, 2))
    saved = [save(10, tensors=parts(rank, 10))]
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    saved += [save(20, tensors=parts(rank, 1 << 20)), save(30, tensors=parts(rank, 30))]
    return saved


def test_where_one_ranks_disk_is_full_no_rank_has_a_checkpoint_and_the_run_goes_on(tmp_path):
    assert run_ranks(save_with_a_full_disk, 2, tmp_path) == [[True, False, True]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]
    for length in (10, 30):
        path = tmp_path / f"step-{length:08d}"
        assert damage_of(path) is None
        saved = load_checkpoint(path)["model"]
        assert torch.equal(saved["cut"], torch.full((2 * length,), float(length)))
        assert saved["all"] == 0  # rank 0's
    (file,) = path.glob("tensors/rank00001-*")
    file.unlink()
    assert f"{file.name}" in damage_of(path)
    with pytest.raises(ValueError, match=r"the shape of model\.cut does not fit"):
        load_checkpoint(path)


def die_while_saving(rank, folder):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    save = partial(save_checkpoint, folder, {"model": {}}, history=3, world=World(rank, 2))
    save(10, tensors=parts(rank, 10))

    def mortal():
        yield from parts(rank, 20)
        if rank == 1:
            os._exit(7)

    save(20, tensors=mortal())


def test_where_a_rank_dies_in_a_save_there_is_no_checkpoint_of_it(tmp_path):
    assert exit_codes(die_while_saving, 2, tmp_path) == [1, 7]
    assert newest_checkpoint(tmp_path).name == "step-00000010"
    assert damage_of(newest_checkpoint(tmp_path)) is None
