"""Copies of weights in half precision: told from activations of the same size, and gone where FSDP2 shrinks them."""

import weakref

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from toolkit.memory.activations import StorageTracker
from toolkit.memory.probe import StepProbe

WIDTH = 64


def layers(count):
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()) for _ in range(count)])


def test_an_activation_as_large_as_a_weight_is_no_copy_of_it():
    model = layers(3)
    images = torch.randn(WIDTH, WIDTH, requires_grad=True)  # each output has as many elements as each weight
    with StepProbe(lambda: {"weights": list(model.parameters())}) as probe:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(images).float().sum()
        probe.forward_done()
        loss.backward()
        probe.backward_done()
    assert probe.rows["weight_casts"] == 3 * 2 * WIDTH * WIDTH
    assert probe.rows["activations"] >= 3 * 2 * WIDTH * WIDTH


class _Checked(StorageTracker):
    """Keeps the storages it follows, so that what it says is alive can be compared with what they hold."""

    def __init__(self):
        super().__init__()
        self.followed = []

    def _follow(self, storage, key, *more):
        self.followed.append(weakref.ref(storage))
        return super()._follow(storage, key, *more)

    def check(self):
        self._note_resized()
        held = {id(one): one.nbytes() for one in (reference() for reference in self.followed) if one is not None}
        alive = sum(one.size_bytes for one in self.lifetimes if one.died is None)
        assert alive == sum(held.values())
        return alive


def test_what_fsdp2_gathers_is_gone_when_its_storage_is_shrunk(one_rank_group):
    """In the second step the shrunk storages of the first are filled again: they are no new ones."""
    model, options = layers(3), {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    for _ in range(2):
        tracker = _Checked()
        tracker.weight_numels = {WIDTH * WIDTH}
        with tracker:
            loss = model(torch.randn(2, WIDTH)).float().sum()
            after_forward = tracker.check()
            loss.backward()
            tracker.check()
        gathered = [one for one in tracker.lifetimes if one.of_weights and one.dtype is torch.bfloat16]
        assert len(gathered) >= 2 * 3 - 1  # in forward, and all but the last anew in backward
        assert all(one.died is not None for one in gathered)
        assert after_forward < 2 * WIDTH * WIDTH  # none of the three is there
        model.zero_grad()


class _Collecting(StorageTracker):
    """The garbage collector may run at any allocation, and take storages that the tracker is just going through."""

    def __init__(self):
        super().__init__()
        self.garbage = []

    def _follow(self, *arguments):
        self.garbage.clear()
        return super()._follow(*arguments)


def test_a_storage_collected_while_the_gathered_ones_are_gone_through_is_dead():
    tracker = _Collecting()
    tracker.weight_numels = {WIDTH}
    with tracker:
        first, second = torch.empty(WIDTH), torch.empty(WIDTH)
        storage, size_bytes = first.untyped_storage(), 4 * WIDTH
        storage.resize_(0)
        torch.empty(1)  # noted as gone
        storage.resize_(size_bytes)
        tracker.garbage.append(second)
        del second
        torch.empty(1)  # the first is followed anew; by then the second has been collected
    assert tracker.garbage == []
    whole = [one for one in tracker.lifetimes if one.size_bytes == size_bytes]
    assert [one.died is None for one in whole] == [False, False, True]
