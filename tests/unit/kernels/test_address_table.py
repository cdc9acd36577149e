"""What the host hands to a launch: on which device, and from which memory a captured graph copies again."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from toolkit.kernels import triton_packed
from toolkit.optim import packed
from toolkit.optim.adamwprune import AdamWPrune

GPU = torch.device("cuda", 1)


def fake(address, numel=2_000, dtype=torch.float32, device=GPU):
    return SimpleNamespace(data_ptr=lambda: address, numel=lambda: numel, dtype=dtype, device=device)


def row(address, numel=2_000):
    return *(fake(address + place, numel) for place in range(4)), [fake(address + 4), fake(address + 5)]


@pytest.fixture
def gpu(monkeypatch):
    """CUDA as far as a table asks for it: copies that are counted, and a switch for capturing."""
    state = SimpleNamespace(capturing=False, pinned=[])

    def pin(values):
        state.pinned.append(values.clone())
        return state.pinned[-1]

    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, *to, **more: original(self, "cpu" if to[0] == GPU else to[0], **more).clone(),
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_a_table_is_copied_when_an_address_changes_and_in_place(gpu):
    table = triton_packed.AddressTable().update([row(100), row(200, 5)], [1, 2])
    first, copies = table.rows, len(gpu.pinned)
    assert first.tolist() == [2_000, 100, 101, 102, 103, 104, 105, 0, 1, 5, 200, 201, 202, 203, 204, 205, 0, 2]
    assert table.programs.tolist() == [[0, 0], [0, 1], [1, 0]]
    table.update([row(100), row(200, 5)], [1, 2])
    assert len(gpu.pinned) == copies
    table.update([row(300), row(200, 5)], [1, 2])
    assert table.rows is first
    assert first[1] == 300
    assert len(gpu.pinned) == copies + 1


def test_a_graph_keeps_both_ends_of_its_copy_and_no_eager_step_writes_to_them(gpu):
    table = triton_packed.AddressTable().update([row(100)], [1])
    eager, copies = table.rows, len(gpu.pinned)
    gpu.capturing = True
    table.update([row(100)], [1])  # the same addresses: a later eager step may change the eager table
    captured = table.rows
    assert captured is not eager
    assert len(gpu.pinned) == copies  # pinned memory is had before a capture
    source = gpu.pinned[-1]  # the spare one, made by the step before
    assert torch.equal(source, captured)
    gpu.capturing = False
    alive = [weakref.ref(captured), weakref.ref(source)]
    for address in (300, 400):
        table.update([row(address)], [1])
        assert table.rows is eager
        assert eager[1] == address
        assert captured[1] == 100
    gpu.pinned.clear()
    del captured, source
    gc.collect()
    assert all(reference() is not None for reference in alive)


def test_a_capture_before_any_step_is_refused(gpu):
    gpu.capturing = True
    with pytest.raises(RuntimeError, match="call step\\(\\) once"):
        triton_packed.AddressTable().update([row(100)], [1])


@pytest.mark.parametrize(
    "other",
    [
        fake(7, device=torch.device("cuda", 0)),
        fake(7, numel=3),
        fake(7, dtype=torch.bfloat16),
        fake(7, dtype=torch.float16),
    ],
)
def test_a_table_holds_tensors_of_one_device_and_dtype(gpu, other):
    _, grad, *rest = row(200)
    with pytest.raises(ValueError, match="cast or move the model before training"):
        triton_packed.AddressTable().update([row(100), (other, grad, *rest)], [1, 2])


def test_a_kernel_is_launched_on_the_device_of_its_tensors(gpu, monkeypatch):
    current, launches = [], []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **flags: launches.append((list(current), grid, flags["DENSE"]))

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(triton_packed.triton_kernels, "sgd_kernel", Kernel())
    tensors = [row(100)]
    table = triton_packed.AddressTable().update(tensors, [1])
    rule = {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "decoupled": False}
    triton_packed.packed_sgd(tensors, table, torch.tensor([1.0]), lr=0.1, **rule)
    assert launches == [([GPU], (2,), False)]


def test_one_call_gets_tensors_of_one_device_and_dtype(monkeypatch):
    monkeypatch.setattr(packed, "choose_implementation", lambda *_: "triton")
    calls = []
    monkeypatch.setattr(AdamWPrune, "update_dense", lambda self, bucket, group: calls.append(("fused", bucket)))
    monkeypatch.setattr(AdamWPrune, "update_by_kernel", lambda self, bucket, group: calls.append(("kernel", bucket)))
    weights = [
        nn.Parameter(torch.ones(4, 4, device=device, dtype=dtype))
        for device in ("cpu", "meta")
        for dtype in (torch.float32, torch.bfloat16)
        for _ in range(2)
    ]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = AdamWPrune(weights, state_dtype="float32")
    optimizer.step()
    assert len(calls) == 4
    for how, bucket in calls:
        device, dtype = bucket.parameters[0].device, bucket.parameters[0].dtype
        assert [(one.device, one.dtype) for one in bucket.parameters] == [(device, dtype)] * 2
        assert bucket.step_tensor.device == device
        assert how == ("fused" if dtype is torch.float32 else "kernel")  # torch's has no other dtype for its moments
