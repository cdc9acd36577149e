import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from toolkit.data import loader
from toolkit.data.decode import EvalTransform, TrainTransform
from toolkit.data.index import load_split
from toolkit.data.loader import EvalLoader, TrainLoader

SIZE = (16, 16)


def train_loader(folder, *, ranks=1, rank=0, workers=0, accumulation=1, global_batch=12, repeats=1):
    return TrainLoader(
        load_split(folder, "train"),
        TrainTransform(SIZE),
        SIZE,
        seed=3,
        rank=rank,
        num_ranks=ranks,
        workers=workers,
        batch_size=global_batch // ranks // accumulation,
        accumulation=accumulation,
        repeats=repeats,
    )


def global_batches(folder, epoch, *, ranks, workers=0, accumulation=1, start=0, repeats=1):
    """(samples, images, labels) of each global step, put together from all ranks."""
    loaders = [
        train_loader(folder, ranks=ranks, rank=rank, workers=workers, accumulation=accumulation, repeats=repeats)
        for rank in range(ranks)
    ]
    streams = [loader.epoch(epoch, start) for loader in loaders]
    steps = []
    for _ in range(loaders[0].steps - start):
        parts = [next(stream) for stream in streams for _ in range(accumulation)]
        steps.append([torch.cat([getattr(part, key) for part in parts]) for key in ("samples", "images", "labels")])
    assert all(next(stream, None) is None for stream in streams)
    return steps


@pytest.mark.parametrize(
    ("ranks", "workers", "accumulation"), [(2, 0, 1), (1, 2, 1), (2, 3, 1), (4, 1, 1), (1, 0, 3), (3, 5, 2)]
)
def test_batches_do_not_depend_on_ranks_workers_or_accumulation(few_digits, ranks, workers, accumulation):
    wanted = global_batches(few_digits, 1, ranks=1)
    got = global_batches(few_digits, 1, ranks=ranks, workers=workers, accumulation=accumulation)
    for a, b in zip(got, wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_copies_are_augmented_anew_lie_on_different_ranks_and_leave_the_steps(few_digits):
    plain = global_batches(few_digits, 1, ranks=1)
    wanted = global_batches(few_digits, 1, ranks=1, repeats=3)
    got = global_batches(few_digits, 1, ranks=3, workers=2, repeats=3)
    assert len(plain) == len(wanted) == len(got)
    read = [sample for samples, _, _ in plain for sample in samples.tolist()]
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        thirds = a[0].view(3, 4)  # of each rank
        assert torch.equal(thirds, thirds[:1].expand(3, 4))
        assert thirds[0].tolist() == read[step * 4 : step * 4 + 4]
        first, second, third = a[1].split(4)
        assert not any(torch.equal(x, y) for x, y in zip((*first, *second), (*second, *third), strict=True))
    assert torch.equal(wanted[0][1][:4], plain[0][1][:4])  # the first copy is that of a run without


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_rest_on_any_number_of_ranks(few_digits, workers):
    whole = global_batches(few_digits, 2, ranks=1)
    rest = global_batches(few_digits, 2, ranks=2, workers=workers, start=5)
    for a, b in zip(rest, whole[5:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_persistent_workers_follow_the_epoch(few_digits):
    loader = train_loader(few_digits, workers=2)
    for epoch in (0, 1, 2):
        got = torch.cat([batch.samples for batch in loader.epoch(epoch)])
        assert sorted(got.tolist()) == sorted(set(got.tolist()))
        wanted = torch.cat([step[0] for step in global_batches(few_digits, epoch, ranks=1)])
        assert torch.equal(got, wanted)


def test_an_epoch_has_each_sample_at_most_once(few_digits):
    loader = train_loader(few_digits, global_batch=10)
    seen = torch.cat([batch.samples for batch in loader.epoch(0)]).tolist()
    assert loader.steps == 9
    assert len(seen) == len(set(seen)) == 90


def test_batches_are_uint8_channels_last(few_digits):
    batch = next(train_loader(few_digits).epoch(0))
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 7), (2, 8), (3, 5), (4, 40)])
def test_evaluation_counts_each_sample_once(few_digits, ranks, batch_size):
    index = load_split(few_digits, "validation")
    seen, steps = [], set()
    for rank in range(ranks):
        loader = EvalLoader(index, EvalTransform(SIZE), SIZE, batch_size=batch_size, rank=rank, num_ranks=ranks)
        steps.add(len(loader))
        for batch in loader:
            seen += batch.samples[batch.weights > 0].tolist()
            assert (batch.weights[batch.samples < 0] == 0).all()
    assert len(steps) == 1
    assert sorted(seen) == list(range(40))


@pytest.fixture
def damaged(few_digits, tmp_path):
    """Sample 5 of both splits overwritten; the file sizes are as before."""
    folder = shutil.copytree(few_digits, tmp_path / "damaged")
    for split in ("train", "validation"):
        index = load_split(folder, split)
        with open(folder / index.names[index.shard[5]], "r+b") as file:
            file.seek(index.offset[5])
            file.write(b"\0" * int(index.size[5]))
    return folder


def test_a_bad_sample_is_replaced_and_counted_in_training(damaged):
    batches = list(train_loader(damaged).epoch(0))
    samples = torch.cat([batch.samples for batch in batches]).tolist()
    assert sum(batch.num_bad for batch in batches) == 1
    assert 5 not in samples
    assert len(samples) == 96
    assert len(set(samples)) == 95


def test_a_bad_sample_has_weight_0_in_evaluation(damaged):
    loader = EvalLoader(
        load_split(damaged, "validation"), EvalTransform(SIZE), SIZE, batch_size=16, rank=0, num_ranks=1
    )
    batches = list(loader)
    assert sum(batch.num_bad for batch in batches) == 1
    assert sum(float(batch.weights.sum()) for batch in batches) == 39


def test_too_few_samples_for_a_batch(few_digits):
    with pytest.raises(ValueError, match="96 training samples do not fill one global batch of 120"):
        train_loader(few_digits, global_batch=120)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from toolkit.data.decode import TrainTransform
from toolkit.data.index import load_split
from toolkit.data.loader import TrainLoader

index = load_split(Path({folder!r}), "train")
loader = TrainLoader(index, TrainTransform((16, 16)), (16, 16), seed=0, batch_size=8, accumulation=1, rank=0,
                     num_ranks=1, workers=2)
batches = loader.epoch(0)
next(batches), next(batches)  # one of each worker: both have begun
signal.signal(signal.SIGTERM, lambda *_: None)  # as the loop does: it saves, then leaves
os.killpg(os.getpgrp(), signal.SIGTERM)         # as a launcher does
print(sum(1 for _ in batches), flush=True)      # the iterator and its workers are alive at exit
keep = batches
"""


def test_workers_outlive_the_launchers_signal_but_not_their_rank(few_digits):
    script = SCRIPT.format(root=str(Path(__file__).parents[3]), folder=str(few_digits))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, start_new_session=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "10\n"


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory.",
        "unable to write to file </torch_1_2_3>: No space left on device (28)",
    ],
)
def test_workers_without_room_in_shared_memory_say_what_to_do(text):
    def batches():
        yield 1
        raise RuntimeError(text)

    given = loader._with_room_named(batches())
    assert next(given) == 1
    with pytest.raises(OSError, match=r"/dev/shm, which has [\d,]+ KiB; use --workers 0, or"):
        next(given)


def test_other_errors_of_workers_stay_what_they_are():
    def batches():
        raise RuntimeError("broken")
        yield

    with pytest.raises(RuntimeError, match="broken"):
        next(loader._with_room_named(batches()))
