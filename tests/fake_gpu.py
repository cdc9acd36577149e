"""A GPU that is not there: tensors that say `cuda:0` and live on CPU, and a count of what a GPU would be asked for.

Within `FakeGpu()` factories and `.to()` take CUDA devices, and every operation on a fake tensor is counted as a
launch. What makes the host wait for the device (or the device's allocator, which a pageable copy does) is counted as a
wait, with the line of this repository that asked for it. Tensors of two devices that meet raise RuntimeError, as CUDA
does; a 0-d CPU tensor may meet any. What it cannot tell: what a kernel does within, how long it takes, and waits of
operations that are not in `_WAITS`.
"""

import collections
import contextlib
import math
import traceback
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
_ROOT = Path(__file__).parents[1]
_CPU = torch.device("cpu")
# Operations that read something from the device before they return, and how often.
_WAITS = {
    "_local_scalar_dense": 1,  # item, int, float, bool
    "nonzero": 1,
    "masked_select": 1,
    "is_nonzero": 1,
    "equal": 1,
    "bincount": 2,  # the highest and lowest value
    "unique_dim": 1,
    "_unique2": 1,
    "repeat_interleave": 1,
}
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
# Views, and memory that nothing is written to: no launch.
_NO_LAUNCH = (
    *("alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "split_with_sizes", "squeeze"),
    *("t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
)
_COPIES = ("_to_copy", "copy_", "_foreach_copy_")


class Counts:
    """Launches by operation, and waits by what waited and where."""

    def __init__(self) -> None:
        self.ops: collections.Counter[str] = collections.Counter()
        self.sites: collections.Counter[str] = collections.Counter()

    @property
    def launches(self) -> int:
        return self.ops.total()

    @property
    def waits(self) -> int:
        return self.sites.total()

    def wait(self, what, times=1):
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(_ROOT / "toolkit"))]
        where = f"{Path(frames[-1].filename).relative_to(_ROOT)}:{frames[-1].lineno}" if frames else "outside"
        self.sites[f"{what} at {where}"] += times

    def __repr__(self) -> str:
        return f"{self.launches} launches {self.ops.most_common(12)}, {self.waits} waits {self.sites.most_common(12)}"


_counts = Counts()  # of the innermost `counting`


@contextlib.contextmanager
def counting():
    """Count launches and waits of what is done within."""
    global _counts
    before, _counts = _counts, Counts()
    try:
        yield _counts
    finally:
        _counts = before


class FakeTensor(torch.Tensor):
    """A tensor on `place` whose elements are those of `inner`, on CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, place=CUDA):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            requires_grad=inner.requires_grad,
        )
        made.inner, made.place = inner.detach(), place
        return made

    def __init__(self, inner, place=CUDA) -> None:
        pass

    @property
    def device(self):
        return self.place

    @property
    def is_cuda(self):
        return True

    @property
    def is_cpu(self):
        return False

    def __repr__(self, **_) -> str:
        return f"FakeTensor({self.inner!r}, {self.place})"

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def tolist(self):
        _counts.wait("tolist")
        return self.inner.tolist()

    def numpy(self, **_):
        raise TypeError("a CUDA tensor has no numpy(); copy it to the host first")

    def __deepcopy__(self, memo):
        made = memo[id(self)] = FakeTensor(self.inner.clone(), self.place).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made._is_param = True
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, dict(kwargs or {}))


def _inner(value):
    return value.inner if isinstance(value, FakeTensor) else value


def _run(func, args, kwargs):
    """Do the operation on CPU, having checked and counted it."""
    name = func._schema.name.split("::")[1]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    places = {tensor.place for tensor in tensors if isinstance(tensor, FakeTensor)}
    place = next(iter(places))
    if kwargs.get("device") is not None:
        place, kwargs["device"] = torch.device(kwargs["device"]), _CPU
    if name in _COPIES:
        place = args[0].device if name == "copy_" else place
        hosts = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.ndim]
        if not all(getattr(tensor, "waits_for_no_copy", False) for tensor in hosts):
            _counts.wait(name)
    else:
        _check(func, name, args, tensors, places)
    if name not in _NO_LAUNCH:
        _counts.ops[name] += 1
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name == "_local_scalar_dense" or place.type == "cpu":
        return out
    if func._schema.is_mutable:  # in place, or into `out`: the caller's own tensors come back
        return kwargs.get("out", args[0] if out is not None else None)
    return tree_map(lambda x: FakeTensor(x, place) if isinstance(x, torch.Tensor) else x, out)


def _check(func, name, args, tensors, places):
    """Raise where devices differ; count what waits."""
    strangers = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.ndim]
    if len(places) > 1 or strangers:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise RuntimeError(f"{func} on several devices: shapes {shapes}, {[str(t.device) for t in tensors]}")
    waits = _WAITS.get(name, 0)
    if name == "repeat_interleave" and len(args) > 1:
        waits = 0  # told how many there will be
    if name == "histc" and (len(args) < 4 or args[2] == args[3]):
        waits = 2
    if name in _INDEXING:
        waits = sum(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if waits:
        _counts.wait(name, waits)


class FakeGpu(TorchFunctionMode):
    """Within it `device="cuda"` works, in factories and `.to()`; see the module."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return _move(func, args, kwargs)
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.waits_for_no_copy = True
            return pinned
        if func is torch.histc and isinstance(args[0], FakeTensor) and not args[0].is_floating_point():
            return _histc_of_integers(*args, **kwargs)
        place = kwargs.get("device")
        if place is None or torch.device(place).type != "cuda":
            return func(*args, **kwargs)
        like = args[0] if args else None
        if isinstance(like, FakeTensor):  # zeros_like and its kin, as_tensor
            assert like.place == _with_index(place), "the harness makes nothing like a tensor on another device"
            return func(*args, **kwargs | {"device": None}) if func is not torch.as_tensor else like
        if func in (torch.tensor, torch.as_tensor):
            _counts.wait(func.__name__)
        elif func.__name__ not in _NO_LAUNCH:
            _counts.ops[func.__name__] += 1
        needs_gradient = kwargs.pop("requires_grad", False)
        kwargs.pop("pin_memory", None)
        made = func(*args, **kwargs | {"device": _CPU})
        return FakeTensor(made, _with_index(place)).requires_grad_(needs_gradient)


def _with_index(place):
    place = torch.device(place)
    return place if place.index is not None else torch.device(place.type, 0)


def _move(func, args, kwargs):
    """`.to()` and its kin, which may change device, dtype and layout."""
    tensor, rest = args[0], list(args[1:])
    place = kwargs.pop("device", None)
    if func is not torch.Tensor.to:
        place = _CPU if func is torch.Tensor.cpu else CUDA
    elif rest and isinstance(rest[0], (str, torch.device)):
        place = rest.pop(0)
    elif rest and isinstance(rest[0], torch.Tensor):
        other = rest.pop(0)
        place, kwargs["dtype"] = other.device, other.dtype
    if rest and isinstance(rest[0], torch.dtype):
        kwargs["dtype"] = rest.pop(0)
    if rest:
        kwargs["non_blocking"] = rest.pop(0)
    dtype, copy = kwargs.get("dtype") or tensor.dtype, kwargs.get("copy", False)
    place = tensor.device if place is None else torch.device(place)
    if place.type == "cuda":
        place = _with_index(place)
    layout = kwargs.get("memory_format", torch.preserve_format)
    if place == tensor.device:
        if dtype is tensor.dtype and not copy and layout is torch.preserve_format:
            return tensor
        return _cast(tensor, dtype, layout, copy)
    if tensor.device != place and not kwargs.get("non_blocking"):
        _counts.wait(f"copy to {place.type}")
    _counts.ops["copy"] += 1
    inner = _inner(tensor.detach()).to(dtype, copy=True, memory_format=layout)
    moved = inner if place.type == "cpu" else FakeTensor(inner, place)
    return moved


def _cast(tensor, dtype, layout, copy):
    with torch._C.DisableTorchFunction():
        return tensor.to(dtype, copy=copy, memory_format=layout)


def _histc_of_integers(digits, bins, lowest, highest):
    """CUDA counts whole numbers too, and leaves out those outside; CPU has no such code."""
    assert (lowest, highest) == (0, bins)
    _counts.ops["histc"] += 1
    inside = digits.inner[(digits.inner >= 0) & (digits.inner <= bins)].clamp(max=bins - 1)
    return FakeTensor(torch.bincount(inside, minlength=bins).to(digits.dtype), digits.place)


def fake(tensor, place=CUDA):
    """A fake tensor, or parameter, with the elements of a real one."""
    made = FakeTensor(tensor.detach().clone(), torch.device(place))
    return torch.nn.Parameter(made) if isinstance(tensor, torch.nn.Parameter) else made


def resnet50_shapes():
    """The 161 shapes of timm's resnet50's parameters, 54 of them prunable, without the model."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("resnet50")
    return [parameter.shape for parameter in model.parameters()]


def num_weights(shapes):
    return sum(math.prod(shape) for shape in shapes)
