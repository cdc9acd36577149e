"""From the builder to the ranks: every image of an epoch once, whatever made the shards."""

import torch
from ranks import run_ranks

from toolkit.data.decode import EvalTransform, TrainTransform
from toolkit.data.index import load_split
from toolkit.data.loader import EvalLoader, TrainLoader

SIZE = (16, 16)


def _read(rank, folder):
    options = {"rank": rank, "num_ranks": 2, "workers": 1}
    train = TrainLoader(
        load_split(folder, "train"), TrainTransform(SIZE), SIZE, seed=0, batch_size=5, accumulation=2, **options
    )
    evaluation = EvalLoader(load_split(folder, "validation"), EvalTransform(SIZE), SIZE, batch_size=3, **options)
    trained = torch.cat([batch.samples for batch in train.epoch(0)])
    evaluated = torch.cat([batch.samples[batch.weights > 0] for batch in evaluation])
    return trained, evaluated, train.steps


def test_two_ranks_read_every_built_image_once(tmp_path):
    from shards.imagenet import main as build
    from shards.synthetic import main as synthetic
    from shards.verify import main as verify

    drawn, built = tmp_path / "drawn", tmp_path / "built"
    synthetic(["--out", str(drawn), "--classes", "20", "--images", "200", "--size", "24", "--shards", "3"])
    build(["--source", str(drawn), "--out", str(built), "--partial", "--train-shards", "7", "--validation-shards", "2"])
    verify([str(built)])
    (first, first_evaluated, steps), (second, second_evaluated, _) = run_ranks(_read, 2, built)
    assert steps == 10
    assert sorted(torch.cat([first, second]).tolist()) == list(range(200))
    assert sorted(torch.cat([first_evaluated, second_evaluated]).tolist()) == list(range(20))
