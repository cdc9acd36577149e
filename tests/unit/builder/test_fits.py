"""The table of largest batches: each is the last that fits, and what does not fit is said."""

import csv
import json

import pytest

from toolkit.builder import fits
from toolkit.builder.predict import Prediction
from toolkit.cli import parse


def test_each_batch_is_the_largest_that_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "CARDS_GIB", (0.5, 1))  # the context alone has half a GiB
    config, said = parse(["--img-size", "160"]), []
    text = fits.write_table(config, tmp_path, said.append, ["test_vit"])
    assert said == ["test_vit", "test_vit, checkpointing"]
    assert "| test_vit, checkpointing | does not fit |" in text
    assert (tmp_path / "fits.md").read_text() == text
    rows = json.loads((tmp_path / "fits.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * len(fits.OPTIMIZERS)
    assert [int(row["largest_batch"]) for row in csv.DictReader((tmp_path / "fits.csv").open())] == [
        row["largest_batch"] for row in rows
    ]
    found = {row["optimizer"]: row["largest_batch"] for row in rows if row["card_gib"] == 1}
    assert found["AdamW"] == found["adamwprune float32"] < found["adamwprune budget"] < found["sgdprune budget"]
    flags = ["--model", "test_vit", "--img-size", "160", "--amp", "bfloat16", "--grad-checkpointing"]
    own = Prediction(parse([*flags, "--opt", "adamwprune", "--sparsity", "0.7", "--state-budget", "auto"]))
    batch = found["adamwprune budget"]
    assert own.needed_bytes(batch) <= 2**30 < own.needed_bytes(batch + 1)


def test_an_optimizer_that_is_not_known_is_refused():
    tracked = Prediction(parse(["--model", "test_vit", "--opt", "adamw"]))
    with pytest.raises(ValueError, match="only the state of our optimizers"):
        tracked.with_optimizer(parse(["--model", "test_vit", "--opt", "lamb"]))
