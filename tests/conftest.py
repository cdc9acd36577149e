import logging
import os
import sys

import pytest
import torch
from flags import train_flags

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: its kernels run on CPU


@pytest.fixture(scope="session")
def webdataset():
    """The library whose format shards have, where it is installed: it opens URLs, and tests read and write by it."""
    return pytest.importorskip("webdataset", reason="webdataset is not installed; requirements.txt has it")


@pytest.fixture
def one_rank_group():
    """One rank has the buckets that many have."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digit shards, built once."""
    from shards.digits import build

    folder = tmp_path_factory.mktemp("digits")
    build(folder, seed=0, train_shards=5, validation_shards=2)
    return folder


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """96 training and 40 validation images in uneven shards, for runs that must be short."""
    from functools import partial

    from sklearn.datasets import load_digits

    from shards.digits import digit_jpeg
    from shards.writer import Sample, write_info, write_split

    folder = tmp_path_factory.mktemp("few")
    scans = load_digits()
    samples = [Sample(f"d{i}", int(scans.target[i]), partial(digit_jpeg, scans.images[i])) for i in range(136)]
    splits = {
        "train": write_split(folder, "train", "few", samples[:96], 3),
        "validation": write_split(folder, "validation", "few", samples[96:], 3),
    }
    write_info(folder, "few", 10, splits, synthetic=False, note="a few digits")
    return folder


@pytest.fixture
def flags(few_digits, tmp_path):
    """Of a short run that writes below tmp_path."""
    return train_flags(few_digits, tmp_path)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps singletons; a test must not see another's."""
    yield
    if "accelerate" in sys.modules:
        from ranks import reset_accelerate

        reset_accelerate()


@pytest.fixture(autouse=True)
def _fresh_log():
    """A run in this process sets up the toolkit's logger; the next test's caplog must see messages again, once each."""
    yield
    logger = logging.getLogger("toolkit")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
