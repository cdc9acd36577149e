"""Tensors cut anywhere over any number of ranks come back whole, and so do those of checkpoints as they were before."""

import json
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from toolkit.dist import World
from toolkit.engine import checkpoint
from toolkit.engine.checkpoint import damage_of, load_checkpoint, newest_checkpoint, save_checkpoint
from toolkit.engine.shard import Shard

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.uint8, torch.int64]


@st.composite
def cut_tensors(draw):
    """Number of ranks; by key a tensor and where it is cut, an entry more than ranks, or None for one that all hold."""
    ranks, found = draw(st.integers(1, 4)), {}
    for number in range(draw(st.integers(1, 5))):
        shape = draw(st.lists(st.integers(1, 5), max_size=4))
        values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(number))
        last = values.numel()
        inner = draw(st.lists(st.integers(0, last), min_size=ranks - 1, max_size=ranks - 1))
        cuts = draw(st.sampled_from([None, [0, *sorted(inner), last]]))
        found[f"model.{number}"] = (values.to(draw(st.sampled_from(DTYPES))), cuts)
    return ranks, found


def parts(tensors, rank):
    for key, (whole, cuts) in tensors.items():
        if cuts is None:
            yield key, whole if rank == 0 else torch.zeros_like(whole)  # rank 0's counts
        else:
            first, last = cuts[rank : rank + 2]
            yield key, Shard(whole.shape, first, whole.reshape(-1)[first:last])


def save_of_all(folder, ranks, tensors):
    """The save of rank 0, where the others write when it asks what they have written."""

    def gather(world, item):
        if not isinstance(item, tuple):
            return [item]
        (temporary,) = folder.glob("tmp-*/tensors")
        worlds = [World(rank, ranks) for rank in range(1, ranks)]
        return [item, *(checkpoint._write_tensors(temporary, parts(tensors, one.rank), one) for one in worlds)]

    with mock.patch.object(World, "gather", gather):
        return save_checkpoint(folder, {"model": {}}, 10, world=World(0, ranks), history=1, tensors=parts(tensors, 0))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=cut_tensors(), file_bytes=st.sampled_from([1, 64, 2**26]))
def test_tensors_cut_anywhere_come_back_whole(tmp_path, cut, file_bytes):
    ranks, tensors = cut
    with mock.patch.object(checkpoint, "_FILE_BYTES", file_bytes):
        assert save_of_all(tmp_path, ranks, tensors)
    path = newest_checkpoint(tmp_path)
    assert damage_of(path) is None
    saved = load_checkpoint(path)["model"]
    assert saved.keys() == {key.removeprefix("model.") for key in tensors}
    for key, (whole, _) in tensors.items():
        found = saved[key.removeprefix("model.")]
        assert found.dtype is whole.dtype
        assert torch.equal(found, whole)


def test_each_rank_writes_what_it_holds_and_files_end_where_they_are_full(tmp_path):
    tensors = {"model.a": (torch.arange(64.0), [0, 48, 64]), "model.b": (torch.zeros(16), None)}
    with mock.patch.object(checkpoint, "_FILE_BYTES", 200):
        assert save_of_all(tmp_path, 2, tensors)
    files = newest_checkpoint(tmp_path).glob("tensors/*")
    assert sorted(file.name for file in files) == [
        "rank00000-00000.safetensors",
        "rank00000-00001.safetensors",  # b beside 192 bytes of a would be more than 200
        "rank00001-00000.safetensors",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"model.a": [63]},
        {"model.a": "wide"},
        {"model.a": [-1, 0]},
        {"model.a": [2**70]},
    ],
)
def test_shapes_that_do_not_fit_are_an_error_that_names_the_tensor(tmp_path, change):
    assert save_of_all(tmp_path, 2, {"model.a": (torch.arange(64.0), [0, 48, 64])})
    mark = newest_checkpoint(tmp_path) / "COMPLETE"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "shapes": change}))
    with pytest.raises(ValueError, match=r"the shape of model\.a does not fit.*; take another checkpoint"):
        load_checkpoint(mark.parent)


def write_as_before(folder, state, tensors):
    """step-10 as it was written when rank 0 brought everything together: whole tensors, by torch's writer."""
    path = folder / "step-00000010"
    path.mkdir(parents=True)
    torch.save(state, path / "state.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(path / "tensors")), no_dist=True)
    files = {str(file.relative_to(path)): checkpoint._checksum(file) for file in path.rglob("*") if file.is_file()}
    mark = {"step": 10, "metric": None, "identity": {"seed": 1}, "files": files}
    (path / "COMPLETE").write_text(json.dumps(mark) + "\n")
    return path


def test_checkpoints_as_they_were_before_load(tmp_path):
    state = {"model": {}, "ema": {}, "optimizer": {"state": {"w": {"count": 3}}, "param_groups": [{"lr": 0.1}]}}
    tensors = {
        "model.w": torch.randn(3, 4),
        "ema.w": torch.randn(3, 4),
        "optimizer.step.w": torch.tensor(7.0),
        "optimizer.mask.w": torch.rand(3, 4) > 0.5,
    }
    path = write_as_before(tmp_path, state, tensors)
    assert damage_of(path) is None
    assert checkpoint.read_identity(path) == {"seed": 1}
    saved = load_checkpoint(path)
    assert torch.equal(saved["model"]["w"], tensors["model.w"])
    assert torch.equal(saved["ema"]["w"], tensors["ema.w"])
    assert saved["optimizer"]["param_groups"] == [{"lr": 0.1}]
    kept = saved["optimizer"]["state"]["w"]
    assert (kept["count"], kept["step"]) == (3, 7.0)
    assert torch.equal(kept["mask"], tensors["optimizer.mask.w"])
