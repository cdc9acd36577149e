from functools import partial

import pytest
import torch

from toolkit.dist import World
from toolkit.engine.checkpoint import (
    damage_of,
    discard_after,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    step_of,
)


@pytest.fixture
def save(tmp_path):
    return partial(save_checkpoint, tmp_path, world=World(), history=2)


def steps(folder):
    return sorted(step_of(path) for path in folder.glob("step-*"))


def test_newest_is_the_highest_complete_one(save, tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 20, 100):
        save({"step": torch.tensor(step)}, step)
    (tmp_path / "step-00000200").mkdir()  # killed while it was written: no COMPLETE
    assert step_of(newest_checkpoint(tmp_path)) == 100
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 100


def test_keeps_history_and_best(save, tmp_path):
    save({}, 10, metric=90.0, best=True)
    for step in (20, 30, 40):
        save({}, step, metric=80.0)
    assert steps(tmp_path) == [10, 30, 40]
    save({}, 50, metric=95.0, best=True)
    assert steps(tmp_path) == [40, 50]


def test_a_failed_write_leaves_the_old_ones(save, tmp_path):
    save({"good": 1}, 10)
    with pytest.raises(AttributeError):
        save({"bad": lambda: 0}, 20)  # a lambda cannot be pickled
    assert steps(tmp_path) == [10]
    assert load_checkpoint(newest_checkpoint(tmp_path)) == {"good": 1}
    save({}, 30)
    assert not list(tmp_path.glob("tmp-*"))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran code')",))


def test_a_checkpoint_cannot_run_code(save, tmp_path):
    save({"evil": Evil()}, 10)
    with pytest.raises(Exception, match="weights_only"):
        load_checkpoint(tmp_path / "step-00000010")


def test_incomplete_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path)


def test_later_checkpoints_go_when_a_run_departs_from_an_earlier_one(save, tmp_path):
    for step in (10, 20):
        save({}, step)
    assert discard_after(tmp_path, 10) == ["step-00000020"]
    assert steps(tmp_path) == [10]


def test_saving_a_step_again_replaces_it_whole(save, tmp_path):
    save({"version": 1}, 10)
    save({"version": 2}, 10)
    assert load_checkpoint(tmp_path / "step-00000010") == {"version": 2}
    assert not list(tmp_path.glob("tmp-*"))


def test_a_damaged_file_is_noticed(save, tmp_path):
    save({"step": 1}, 10, tensors={"model.w": torch.arange(1000.0)}.items())
    folder = newest_checkpoint(tmp_path)
    assert damage_of(folder) is None
    assert torch.equal(load_checkpoint_with(folder)["w"], torch.arange(1000.0))
    (file,) = (folder / "tensors").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert file.name in damage_of(folder)
    file.unlink()
    assert "FileNotFoundError" in damage_of(folder)


def load_checkpoint_with(folder):
    state = torch.load(folder / "state.pt", weights_only=True)
    assert state == {"step": 1}
    from toolkit.engine.checkpoint import _read_tensors

    return {key.removeprefix("model."): value for key, value in _read_tensors(folder / "tensors").items()}


def _on_a_full_disk(folder):
    """Files beyond 1 MiB are refused by the system, as on a full disk."""
    import resource

    save = partial(save_checkpoint, folder, world=World(), history=2)
    assert save({"good": 1}, 10, tensors={"model.w": torch.zeros(10)}.items())
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    assert not save({"bad": 1}, 20, tensors={"model.w": torch.zeros(1 << 20)}.items())
    assert not save({"bad": torch.zeros(1 << 20)}, 30)
    return save({"good": 2}, 40, tensors={"model.w": torch.ones(10)}.items())


def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on(tmp_path):
    from ranks import run_ranks

    assert run_ranks(lambda rank: _on_a_full_disk(tmp_path), 1, join_group=False) == [True]
    assert steps(tmp_path) == [10, 40]
    assert not list(tmp_path.glob("tmp-*"))
    assert damage_of(tmp_path / "step-00000010") is None


def test_tensors_that_share_memory_or_have_gaps_are_saved_apart(save, tmp_path):
    shared = torch.arange(12.0)
    tensors = {"model.a": shared[:6], "model.b": shared[3:9], "model.c": shared.view(3, 4).t(), "model.d": shared}
    save({}, 10, tensors=tensors.items())
    from toolkit.engine.checkpoint import _read_tensors

    found = _read_tensors(tmp_path / "step-00000010" / "tensors")
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
