"""What a run may change when it goes on in its folder. The matrix asks it too."""

from pathlib import Path

from toolkit.config import Config

# Settings a resumed run may change: where it writes, how fast it reads, how often it speaks. The batch is compared as
# the global one, the data by fingerprint.
FREE_ON_RESUME = {
    "output",
    "experiment",
    "resume",
    "data_dir",
    "workers",
    "pin_mem",
    "log_interval",
    "report_to",
    "checkpoint_hist",
    "checkpoint_interval",
    "dist_timeout",
    "max_bad_images",
    "batch_size",
    "global_batch_size",
    "grad_accum_steps",
    "validation_batch_size",
    "auto_batch_size",
    "shard_cache",
    "shard_cache_gib",
}


def check_same_settings(folder: Path, config: Config) -> None:
    """Raise ValueError where a run folder's args.yaml has other settings than `config`; no args.yaml is no clash."""
    import yaml

    from toolkit.builder.optimizer import with_state_budget  # with torch, which a matrix that starts has no need of

    path = folder / "args.yaml"
    if not path.exists():
        return
    before, now = yaml.safe_load(path.read_text()), with_state_budget(config).to_dict()
    for settings in (before, now):  # nothing said was the weights' own dtype before `auto` was the default
        if settings.get("state_dtype") is None and settings.get("state_budget") is None:
            settings["state_dtype"] = settings.get("model_dtype") or "float32"
    others = sorted(key for key in before.keys() & now.keys() - FREE_ON_RESUME if before[key] != now[key])
    if others:
        raise ValueError(
            f"{folder} was made with {'; '.join(f'{key}={before[key]}, now {now[key]}' for key in others)}; give the "
            "settings of its args.yaml to go on, or write elsewhere (another --experiment or --out)"
        )
