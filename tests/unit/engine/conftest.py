import pytest


@pytest.fixture
def flags(few_digits, tmp_path):
    return [
        "--data-dir",
        str(few_digits),
        "--model",
        "test_resnet",
        "--img-size",
        "32",
        "--global-batch-size",
        "16",
        "--epochs",
        "3",
        "--lr",
        "3e-3",
        "--warmup-epochs",
        "0",
        "--sched-on-updates",
        "--color-jitter",
        "0",
        "--hflip",
        "0",
        "-j",
        "0",
        "--log-interval",
        "2",
        "--prune-frequency",
        "2",
        "--output",
        str(tmp_path),
    ]
