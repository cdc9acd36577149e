"""train.py's flags for a run of seconds on a few digits; later ones win."""


def train_flags(data, output, *more):
    settings = {
        "data-dir": data,
        "model": "test_resnet",
        "img-size": 32,
        "global-batch-size": 16,
        "epochs": 3,
        "lr": 3e-3,
        "warmup-epochs": 0,
        "color-jitter": 0,
        "hflip": 0,
        "workers": 0,
        "log-interval": 2,
        "prune-frequency": 2,
        "output": output,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))] + [
        "--sched-on-updates",
        *more,
    ]


def vit_flags(data, output, *more):
    """Of a model without BatchNorm, whose ranks can equal one."""
    return train_flags(data, output, "--model", "test_vit", "--global-batch-size", "12", *more)
