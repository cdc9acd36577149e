import pytest
import torch

from toolkit.dist import World
from toolkit.engine.checkpoint import CheckpointStore, discard_after, load_checkpoint, newest_checkpoint, step_of


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, World(), history=2)


def steps(folder):
    return sorted(step_of(path) for path in folder.glob("step-*"))


def test_newest_is_the_highest_complete_one(store, tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step in (5, 20, 100):
        store.save({"step": torch.tensor(step)}, step)
    (tmp_path / "step-00000200").mkdir()  # killed while it was written: no COMPLETE
    assert step_of(newest_checkpoint(tmp_path)) == 100
    assert load_checkpoint(newest_checkpoint(tmp_path))["step"] == 100


def test_keeps_history_and_best(store, tmp_path):
    store.save({}, 10, metric=90.0, best=True)
    for step in (20, 30, 40):
        store.save({}, step, metric=80.0)
    assert steps(tmp_path) == [10, 30, 40]
    store.save({}, 50, metric=95.0, best=True)
    assert steps(tmp_path) == [40, 50]


def test_a_failed_write_leaves_the_old_ones(store, tmp_path):
    store.save({"good": 1}, 10)
    with pytest.raises(AttributeError):
        store.save({"bad": lambda: 0}, 20)  # a lambda cannot be pickled
    assert steps(tmp_path) == [10]
    assert load_checkpoint(newest_checkpoint(tmp_path)) == {"good": 1}
    store.save({}, 30)
    assert not list(tmp_path.glob("tmp-*"))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran code')",))


def test_a_checkpoint_cannot_run_code(store, tmp_path):
    store.save({"evil": Evil()}, 10)
    with pytest.raises(Exception, match="weights_only"):
        load_checkpoint(tmp_path / "step-00000010")


def test_incomplete_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path)


def test_later_checkpoints_go_when_a_run_departs_from_an_earlier_one(store, tmp_path):
    for step in (10, 20):
        store.save({}, step)
    assert discard_after(tmp_path, 10) == ["step-00000020"]
    assert steps(tmp_path) == [10]


def test_saving_a_step_again_replaces_it_whole(store, tmp_path):
    store.save({"version": 1}, 10)
    store.save({"version": 2}, 10)
    assert load_checkpoint(tmp_path / "step-00000010") == {"version": 2}
    assert not list(tmp_path.glob("tmp-*"))
