"""What one training step allocates, tracked on fake tensors at two small batch sizes and extended to any other.

Every storage's size is linear in the batch, and the sequence of operations does not depend on it. So two small tracks
tell for every moment of a step what is alive at any batch size; no memory is touched and no GPU is needed.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from toolkit.memory.ledger import storage_key

# Weights from which on an update fused into backward frees a gradient when it is there; smaller ones wait together.
FREED_AT_ONCE = 4096

# Rows that live within a step only; the others of the ledger stand between steps.
STEP_ROWS = ("gradients", "input", "activations", "weight_casts", "workspace")


_HALF = (torch.bfloat16, torch.float16)
Life = tuple[str, int, int, int]  # row, born, died (the last event: it stayed), bytes


@dataclass
class Lifetime:
    """One storage: its size in bytes, and the numbers of the events at which it came and went (None: it stayed).

    `of_weights`: a weight's own, or made of weights alone, as autocast's copy of one.
    """

    size_bytes: int
    born: int
    died: int | None = None
    dtype: torch.dtype | None = None
    of_weights: bool = False


class StorageTracker(TorchDispatchMode):
    """Records the lifetime of every storage made while it is active; an event is a birth or a death.

    What FSDP2 gathers is made of no tensor, has as many elements as a weight (`weight_numels`), and is freed and had
    again by resizing its storage, which no operator tells: such storages are looked at before each operator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lifetimes: list[Lifetime] = []
        self.events = 0
        self.weight_numels: set[int] = set()
        self._alive: dict[int, Lifetime] = {}
        self._gathered: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note the storages it made."""
        self._note_resized()
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self.of(leaf) is None and leaf.untyped_storage().nbytes():
                self._note_born(leaf, [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)])
        return result

    def _note_born(self, tensor: Tensor, sources: list[Tensor]) -> None:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        made = self._follow(storage, key, tensor.dtype, self.events)
        self.events += 1
        if not sources or key in map(storage_key, sources):  # the latter was there before, shrunk to nothing
            made.of_weights = storage.nbytes() // tensor.itemsize in self.weight_numels
            if made.of_weights:
                self._gathered[key] = weakref.ref(storage)
        else:
            made.of_weights = all(origin and origin.of_weights for origin in map(self.of, sources))

    def _follow(self, storage: torch.UntypedStorage, key: int, dtype: torch.dtype | None, born: int) -> Lifetime:
        lifetime = self._alive[key] = Lifetime(storage.nbytes(), born, dtype=dtype)
        self.lifetimes.append(lifetime)
        weakref.finalize(storage, self._died, key, lifetime)
        return lifetime

    def _died(self, key: int, lifetime: Lifetime) -> None:
        if lifetime.died is None:
            lifetime.died = self.events
            self.events += 1
        if self._alive.get(key) is lifetime:
            del self._alive[key]
            self._gathered.pop(key, None)

    def _note_resized(self) -> None:
        for key, reference in list(self._gathered.items()):
            storage, lifetime = reference(), self._alive.get(key)
            if storage is None or lifetime is None:  # collected since the list was made: `_died` has noted it
                continue
            if storage.nbytes() == (0 if lifetime.died is not None else lifetime.size_bytes):
                continue
            if lifetime.died is None:
                lifetime.died = self.events
                self.events += 1
            if storage.nbytes():
                self._follow(storage, key, lifetime.dtype, self.events).of_weights = True
                self.events += 1

    def of(self, tensor: Tensor) -> Lifetime | None:
        """The lifetime of a tensor's storage, None if it was there before."""
        return self._alive.get(storage_key(tensor))

    def stands(self, tensor: Tensor) -> Lifetime:
        """Count a tensor's storage as one that is there from the start, unless it is known already."""
        return self.of(tensor) or self._follow(tensor.untyped_storage(), storage_key(tensor), tensor.dtype, 0)

    def leave_out(self, tensor: Tensor) -> None:
        """Count none of a tensor's bytes from here on, though it was made while this was active."""
        lifetime = self.of(tensor)
        if lifetime is not None:
            lifetime.size_bytes = 0
            self._gathered.pop(storage_key(tensor), None)  # by its size it may look like a gathered weight

    def forget(self, tensors: Iterable[Tensor], *, weights: bool = False) -> None:
        """Leave out tensors that were there before."""
        for tensor in tensors:
            self._alive[storage_key(tensor)] = Lifetime(0, 0, of_weights=weights)


class _KeptStatistics(TorchDispatchMode):
    """Gives fake BatchNorm the statistics that real BatchNorm keeps for backward.

    Of half-precision images they are float32 where the layer is; torch's formula for fake tensors rounds them to half.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator; mean and deviation, [channels] each, are widened."""
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.native_batch_norm.default:
            return result
        _, *of_layer = [one for one in args if isinstance(one, Tensor)]  # images, scale, shift, running averages
        wide = torch.float32 if any(one.dtype is torch.float32 for one in of_layer) else result[1].dtype
        return result[0], *(torch.empty_like(kept, dtype=wide) for kept in result[1:])


@dataclass(frozen=True)
class StepMemory:
    """Forward and backward of one step: what lives when, at any batch size. `events` numbers their moments.

    Of each storage: the row, the events at which it came and went, and `fixed` and `slope`: bytes at batch b are
    fixed + slope * b.
    """

    storages: tuple[tuple[str, int, int, float, float], ...]
    events: int

    def peak(self, batch_size: int) -> dict[str, int]:
        """Bytes by row when most is allocated: gradients, input, activations, weight_casts, workspace."""
        lives = [
            (row, born, died, round(fixed + slope * batch_size)) for row, born, died, fixed, slope in self.storages
        ]
        return rows_at_peak(lives, self.events, STEP_ROWS)[0]


def rows_at_peak(
    lives: Sequence[tuple[str, int, int, int]], events: int, rows: Iterable[str]
) -> tuple[dict[str, int], int]:
    """(bytes by row when most is alive, the event at which that is).

    `lives` are (row, born, died, bytes); the rows of `rows` come first, also where nothing of them is alive.
    """
    change = [0] * (events + 1)
    for _, born, died, size in lives:
        change[born] += size
        change[died] -= size
    totals = list(itertools.accumulate(change))
    moment = totals.index(max(totals))
    found = dict.fromkeys(rows, 0)
    for row, born, died, size in lives:
        if born <= moment < died:
            found[row] = found.get(row, 0) + size
    return found, moment


def track_step(
    make_model: Callable[[], nn.Module],
    input_size: tuple[int, int, int],
    num_classes: int,
    *,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    frees_gradients: bool = False,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    soft_targets: bool = False,
    batch_sizes: tuple[int, int] = (2, 4),
    on_progress: Callable[[str], None] = lambda text: None,
) -> StepMemory:
    """Track forward, loss and backward of a model at two batch sizes, on fake tensors.

    `loss` is of float32 logits [b, classes] and labels [b], or with `soft_targets` shares of classes [b, classes].
    `frees_gradients`: each gradient, but small ones, is freed as soon as it is there, as the update fused into backward
    does. Raises ValueError where the two tracks differ in their operations, so that no line can be drawn through them.
    """
    tracks = []
    for batch_size in batch_sizes:
        on_progress(f"tracking forward and backward at batch size {batch_size}")
        shape = (batch_size, *input_size)
        targets = torch.zeros(batch_size, num_classes) if soft_targets else torch.zeros(batch_size, dtype=torch.int64)
        tracks.append(_track(make_model, shape, targets, loss, amp_dtype, channels_last, frees_gradients))
    (first, events), (second, other_events) = tracks
    if len(first) != len(second) or events != other_events:
        raise ValueError("the model's operations depend on the batch size; its memory cannot be predicted from two")
    small, large = batch_sizes
    storages = []
    for (row, born, died, size), (_, _, _, other_size) in zip(first, second, strict=True):
        slope = (other_size - size) / (large - small)
        storages.append((row, born, died, size - slope * small, slope))
    return StepMemory(tuple(storages), events)


def _track(
    make_model: Callable[[], nn.Module],
    shape: Sequence[int],
    targets: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    amp_dtype: torch.dtype | None,
    channels_last: bool,
    frees_gradients: bool,
) -> tuple[list[Life], int]:
    """(what each storage was, events) of one step."""
    model = make_model().train()  # a real one: many constructors read values, which fake tensors do not have
    if channels_last:  # before it is fake: torch 2.14 cannot swap the layout of a fake parameter
        model = model.to(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _make_fake(model, fake)
        tracker = StorageTracker()
        tracker.forget(model.buffers())
        tracker.forget(model.parameters(), weights=True)
        gradients: list[Lifetime | None] = []

        def free(parameter: Tensor) -> None:
            gradients.append(tracker.of(parameter.grad) if parameter.grad is not None else None)
            parameter.grad = None

        for parameter in model.parameters() if frees_gradients else ():
            if parameter.requires_grad and parameter.numel() >= FREED_AT_ONCE:
                parameter.register_post_accumulate_grad_hook(free)
        with _KeptStatistics(), tracker:
            images = torch.empty(tuple(shape), dtype=next(model.parameters()).dtype)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            targets = torch.empty_like(targets)
            inputs = [tracker.of(images), tracker.of(targets)]
            with torch.autocast("cpu", dtype=amp_dtype or torch.bfloat16, enabled=amp_dtype is not None):
                loss = loss_of(model(images).float(), targets)
            forward_end = tracker.events
            loss.backward()
        gradients += [tracker.of(p.grad) for p in model.parameters() if p.grad is not None]
        names = {id(one): "gradients" for one in gradients} | {id(one): "input" for one in inputs}
        return classify(tracker, names, forward_end), tracker.events


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace a model's parameters and buffers by fake ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            made = fake.from_tensor(parameter.detach())
            module._parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            module._buffers[name] = fake.from_tensor(buffer)


def classify(tracker: StorageTracker, names: Mapping[int, str], forward_end: int) -> list[Life]:
    """What each storage was: its row is its name by id, or else activations (alive when forward ends), or workspace.

    Of the activations, half precision made of weights alone is weight_casts.
    """
    lives = []
    for one in tracker.lifetimes:
        died = tracker.events if one.died is None else one.died
        held = "weight_casts" if one.of_weights and one.dtype in _HALF else "activations"
        row = names.get(id(one)) or (held if one.born < forward_end <= died else "workspace")
        lives.append((row, one.born, died, one.size_bytes))
    return lives
