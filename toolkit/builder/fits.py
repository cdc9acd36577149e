"""Which batch fits which card: models × optimizers × checkpointing, all predicted; for `results/bench/fits.md`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.builder.predict import Prediction
from toolkit.config import Config
from toolkit.files import csv_text, write_atomically, write_result
from toolkit.markdown import page, table

CARDS_GIB = (16, 24, 48, 80)
MODELS = (
    "resnet50",
    "convnext_large",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
    "vit_giant_patch14_224",
)
SPARSITY = 0.7
_BUDGET: dict[str, Any] = {"sparsity": SPARSITY, "state_budget": "auto"}
OPTIMIZERS: dict[str, dict[str, Any]] = {  # in the table's order: settings by the column's name
    "SGD": {"opt": "sgd"},
    "AdamW": {"opt": "adamw"},
    "8-bit AdamW": {"opt": "adamwprune", "sparsity": 0.0, "state_dtype": "int8"},
    "adamwprune float32": {"opt": "adamwprune", "sparsity": SPARSITY, "state_dtype": "float32"},
    "adamwprune budget": {"opt": "adamwprune", **_BUDGET},
    "sgdprune budget": {"opt": "sgdprune", **_BUDGET},
}
_COLUMNS = ("model", "grad_checkpointing", "card_gib", "optimizer", "largest_batch", "needed_at_batch_1_bytes")


def largest_batches(config: Config, models: Sequence[str], log: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A row a model, checkpointing, card and optimizer, under bfloat16 AMP; a batch of 0 means that none fits."""
    for model in models:
        for checkpointing in (False, True):
            log(f"{model}{', checkpointing' if checkpointing else ''}")
            shown = dataclasses.replace(config, model=model, amp="bfloat16", grad_checkpointing=checkpointing)
            tracked = Prediction(dataclasses.replace(shown, **OPTIMIZERS["AdamW"]))
            for name, settings in OPTIMIZERS.items():
                prediction = tracked.with_optimizer(dataclasses.replace(shown, **settings))
                for card_gib in CARDS_GIB:
                    found = prediction.largest_batch(card_gib * 2**30)
                    row = (model, checkpointing, card_gib, name, found, prediction.needed_bytes(1))
                    yield dict(zip(_COLUMNS, row, strict=True))


def to_markdown(rows: Sequence[dict[str, Any]], size: int, command: str) -> str:
    """A table a card: models down, optimizers across."""
    lines = [
        f"# Largest batch that fits, at {size} px",
        "",
        f"Predicted, not measured; no GPU was used. Made by `{command}`; needed bytes stand in fits.csv.",
        "",
        f"bfloat16 AMP, one GPU, 1,000 classes. Pruning is by state, to {SPARSITY:.0%}. The highest phase decides: for "
        "float32 state that is the dense one, where it is AdamW's.",
        "",
        "8-bit AdamW is `--opt adamwprune --sparsity 0 --state-dtype int8`; budget is `--state-budget auto`.",
    ]
    cells = {(row["card_gib"], row["model"], row["grad_checkpointing"], row["optimizer"]): row for row in rows}
    models = list(dict.fromkeys((row["model"], row["grad_checkpointing"]) for row in rows))
    for card_gib in CARDS_GIB:
        body = []
        for model, checkpointing in models:
            found = [cells[card_gib, model, checkpointing, name]["largest_batch"] for name in OPTIMIZERS]
            body.append([f"{model}{', checkpointing' if checkpointing else ''}", *(b or "does not fit" for b in found)])
        lines += ["", f"## {card_gib} GiB", "", *table(("model", *OPTIMIZERS), body)]
    return page(*lines)


def write_table(config: Config, folder: Path, log: Callable[[str], None], models: Sequence[str] = MODELS) -> str:
    """Predict all, write fits.md, fits.json and fits.csv; returns the page."""
    size = config.img_size or 224
    rows = list(largest_batches(dataclasses.replace(config, img_size=size), models, log))
    text = to_markdown(rows, size, "python -m toolkit.memory.predict --table")
    write_result(folder, "fits", {"schema": "fits/1", "img_size": size, "rows": rows}, text)
    write_atomically(folder / "fits.csv", csv_text(_COLUMNS, rows))
    return text
