import pytest
import torch
from ranks import run_ranks

from toolkit.dist import World


def _collectives(rank):
    world = World.detect(torch.device("cpu"))
    assert (world.rank, world.num_ranks, world.is_main) == (rank, 3, rank == 0)
    values = torch.tensor([float(rank), 1.0])
    return world.sum(values.clone()).tolist(), world.max(values.clone()).tolist(), world.gather({"rank": rank})


def test_three_ranks():
    for total, largest, gathered in run_ranks(_collectives, 3):
        assert total == [3.0, 3.0]
        assert largest == [2.0, 1.0]
        assert gathered == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


def test_one_rank_is_the_identity():
    world, values = World(), torch.tensor([2.0])
    assert world.sum(values) is values
    assert world.max(values) is values
    assert world.gather("x") == ["x"]
    world.barrier()


def _fail(rank):
    if rank == 1:
        raise RuntimeError("boom")


def test_the_harness_reports_a_failing_rank():
    with pytest.raises(AssertionError, match=r"rank 1:[\s\S]*boom"):
        run_ranks(_fail, 2)
