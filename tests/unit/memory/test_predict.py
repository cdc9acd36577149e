"""What a real step takes against the tracks on fake tensors, and the command that predicts."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from toolkit.memory.activations import StorageTracker, track_step
from toolkit.memory.predict import main


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "resnet10t"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_real_step_takes_what_was_predicted(model, amp, layout):
    size = 160 if model == "test_vit" else 64
    options = {"img_size": size} if model == "test_vit" else {}
    last = layout is torch.channels_last
    make = functools.partial(timm.create_model, model, **options)
    expected = track_step(make, (3, size, size), 1000, amp_dtype=amp, channels_last=last)
    real = make().train().to(memory_format=layout)
    tracker = StorageTracker()
    tracker.forget(tensor for tensor in (*real.parameters(), *real.buffers()))
    with tracker:
        images, labels = torch.zeros(11, 3, size, size), torch.zeros(11, dtype=torch.int64)
        images = images.contiguous(memory_format=layout)
        with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
            loss = nn.functional.cross_entropy(real(images), labels)
        loss.backward()
    change = [0] * (tracker.events + 1)
    for one in tracker.lifetimes:
        change[one.born] += one.size_bytes
        change[tracker.events if one.died is None else one.died] -= one.size_bytes
    total = highest = 0
    for difference in change:
        total += difference
        highest = max(highest, total)
    assert sum(expected.peak(11).values()) == highest


def test_the_command(capsys):
    flags = ["--model", "test_resnet", "-b", "16", "--opt", "adamwprune", "--sparsity", "0.7", "--fits", "48GiB"]
    assert main([*flags, "--max-batch-size", "2GiB", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["peak_allocated_bytes"].keys() == {"dense", "final"}
    assert result["fits"]["fits"] is True
    assert result["max_batch_size"]["batch_size"] > 16
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "48 GiB: it fits." in said
    assert "peak allocated" in said


START = ["--opt", "adamwprune", "--sparsity", "0.9", "--prune-start", "0.5"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "resnet5000"], "is not a timm model"),
        (["--opt", "lamb"], "python -m toolkit.optim --list"),
        (["--fits", "many"], "write it like 48GiB"),
        (["--sparsity", "1"], "must be in"),
        (["-b", "0"], "at least 1"),
        (["--ranks", "0"], "at least 1"),
        (["--opt", "adamwprune"], "needs --sparsity"),
        (["--opt", "adamwprune", "--sparsity", "0.5", "--prune-start", "0.6"], "at most the --sparsity of the end"),
        # As the run does: its budget is planned before the start.
        ([*START, "--state-budget", "1.5"], "smallest possible, 2.1"),
        (["--auto-batch-size", "48GiB"], "--max-batch-size"),
        (["--global-batch-size", "10", "--ranks", "4"], "use 8 or 12"),
    ],
)
def test_mistakes_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said


def test_train_py_flags_mean_what_they_mean_there(capsys):
    """A training command's flags, pasted: those that do not bear on memory are taken too."""
    flags = ["--model", "test_resnet", "--opt", "adamw", "--global-batch-size", "64", "--grad-accum-steps", "2"]
    assert main([*flags, "--ranks", "4", "--lr", "1", "--amp", "bf16", "--num-classes", "7", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["batch_size"], result["ranks"], result["amp"], result["opt"]) == (8, 4, "bf16", "adamw")
    assert main(["--model", "test_resnet", "-b", "1", "--zero", "2", "--ranks", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["zero"], result["fsdp"], result["opt"]) == (2, False, "sgd")  # train.py's default
    assert result["ledger"]["dense"]["flat_copies"] == -(-result["ledger"]["dense"]["weights"] // 4)


def test_help_loads_no_torch():
    probe = (
        "import sys, runpy\nsys.argv = ['predict', '--help']\n"
        "try: runpy.run_module('toolkit.memory.predict', run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)\n"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
