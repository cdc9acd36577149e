"""What a report's names of methods and settings mean, for a reader who has only the report."""

from collections.abc import Iterable

from toolkit.markdown import table

_WORDS = {  # in the order of the table; a word is explained where one of the names has it
    "adamwprune": "AdamW that prunes by its own moments and keeps none for pruned weights",
    "sgdprune": "SGD with momentum that prunes as it steps and keeps no momentum for pruned weights",
    "+ magnitude": "the smallest weights go",
    "+ movement": "weights go that training moves towards zero (Sanh et al., 2020)",
    "+ displacement": "weights go that moved little from their first value (the original study's score)",
    "+ state": "pruned by the optimizer's own moments, which are dropped with the weights",
    "budget auto": "moments in 8 bits while weights are many, then bfloat16, float32 for the last ones",
    "float32": "moments of four bytes",
    "prune_begin=": "share of training after which pruning begins",
    "prune_end=": "share of training after which the zeros stay as they are",
    "prune_start=": "share of zeros before the first step",
    "prune_regrow=": "share of the surviving weights that each update exchanges",
    "prune_scope=erk": "larger layers are pruned more (Erdős–Rényi kernel); else all layers compete as one",
    "prune_scope=layer": "every layer is pruned to the same share; else all layers compete as one",
}


def words_section(names: Iterable[str]) -> list[str]:
    """The words that occur in `names`, explained; nothing where none does."""
    text = "\n".join(names)
    rows = [[f"`{word.strip('+= ')}`", meaning] for word, meaning in _WORDS.items() if word in text]
    return ["## What the names mean", "", *table(["name", "meaning"], rows, text=(0, 1)), ""] if rows else []
