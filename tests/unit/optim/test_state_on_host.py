"""state_dict() of packed or narrow state: its dense form is made on the host, and loaded a piece at a time."""

import weakref
from unittest import mock

import fake_gpu
import pytest
import torch
from fake_gpu import FakeGpu, fake
from timm.optim import create_optimizer_v2
from torch import nn

import toolkit.optim  # noqa: F401

PRUNING = {"sparsity": 0.7, "begin_step": 2, "end_step": 4, "frequency": 1}


class DeviceBytes:
    """Bytes of the tensors made on the fake GPU that are alive, and the most there were; views count for nothing."""

    def __init__(self, known):
        self.now = self.most = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def made(self, inner, place):
        storage = inner.untyped_storage()
        if place.type == "cuda" and storage._cdata not in self._alive:
            self._alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._died, storage._cdata, storage.nbytes())

    def _died(self, key, nbytes):
        self._alive.discard(key)
        self.now -= nbytes


def made_on_device(work, known):
    count, new = DeviceBytes(known), fake_gpu.FakeTensor.__new__

    def counted(cls, inner, place=fake_gpu.CUDA):
        count.made(inner, place)
        return new(cls, inner, place)

    with mock.patch.object(fake_gpu.FakeTensor, "__new__", counted):
        result = work()
    return result, count


def build(weights, name, **options):
    return create_optimizer_v2(weights, name, lr=1e-2, implementation="reference", **PRUNING, **options)


@pytest.mark.parametrize("name", ["adamwprune", "sgdprune"])
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"state_budget": "auto"}], ids=str)
@pytest.mark.parametrize("steps", [1, 5])
def test_the_dense_form_never_stands_on_the_device(name, options, steps, monkeypatch):
    monkeypatch.setattr("toolkit.prune.stores.chunk_size", lambda device: 1024)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(128, 256, generator=generator), torch.randn(32, 160, generator=generator)]
    with FakeGpu():
        weights = [fake(nn.Parameter(value)) for value in values]
        optimizer = build(weights, name, **options)
        for _ in range(steps):
            for weight in weights:
                weight.grad = fake(torch.randn(weight.shape, generator=generator))
            optimizer.step()
        there = [*weights, *(one for weight in weights for one in optimizer.state[weight].values())]
        saved, count = made_on_device(optimizer.state_dict, there)
        assert count.most == 0, "something was made on the device"
        keys = [key for key in saved["state"][0] if key != "step"]
        narrow_or_packed = steps == 5 or options
        assert {saved["state"][0][key].device.type for key in keys} == {"cpu" if narrow_or_packed else "cuda"}
        again = build(weights, name, **options)
        _, count = made_on_device(lambda: again.load_state_dict(saved), there)
        kept = sum(one.nbytes for weight in weights for key, one in again.state[weight].items() if key != "step")
        assert kept <= count.most <= kept + 96 * 1024  # the dense form is 148 KiB or more
        for weight in weights:
            for key, value in optimizer.state[weight].items():
                assert value.tolist() == again.state[weight][key].tolist(), key
