import pytest
import torch

import toolkit.optim  # noqa: F401
from launch.gpu_check import MEMORY_ROWS, TRAINED, compare_training, main, measure_memory, to_markdown

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opt", MEMORY_ROWS)
def test_memory_rows_run(opt):
    row = measure_memory("test_resnet", opt, 2, "bf16", 32, CPU)
    assert row["measured_bytes"] == {
        "dense": None,
        "final": None,
    }  # CPU has no allocator to ask, and RSS is no stand-in
    assert row["predicted_bytes"]["dense"] > 0
    assert "error" not in row


@pytest.mark.parametrize("opt", TRAINED)
def test_training_rows_run_and_tables_are_made(opt):
    row = compare_training("test_resnet", opt, 0, 8, 4, 32, CPU, num_images=50)
    assert row["sparsity"] == pytest.approx(0.7 if "-" in opt or "prune" in opt else 0.0, abs=1e-3)
    memory = measure_memory("test_resnet", opt, 2, None, 32, CPU)
    facts = {"device": "x", "torch": "y", "total_bytes": 2**30, "command": "c", "missing": []}
    text = to_markdown({**facts, "memory": [memory], "training": [row]})
    assert f"| test_resnet | {opt} | 0 | 8 |" in text
    assert "SYNTHETIC" in text
