import dataclasses
import typing

import numpy as np
import pytest
import torch
from torch import nn

from toolkit.optim.adamwprune import AdamWPrune
from toolkit.optim.adamwspam import AdamWSPAM
from toolkit.optim.sgdprune import SGDPrune
from toolkit.prune.hooks import pruned_by_hooks
from toolkit.prune.options import OPTION_NAMES, PruningKeywords, PruningOptions

PACKED = [AdamWPrune, SGDPrune, AdamWSPAM]
HOOKED = [pruned_by_hooks(torch.optim.AdamW, method) for method in ("magnitude", "movement")]


def weights():
    return [nn.Parameter(torch.randn(6, 5))]


def test_the_keywords_are_the_fields():
    hints = typing.get_type_hints(PruningOptions)
    fields = {name: hints[name] for name in OPTION_NAMES} | {"sparsity": float | None}  # None: what the pattern says
    assert typing.get_type_hints(PruningKeywords) == fields
    assert tuple(field.name for field in dataclasses.fields(PruningOptions)) == OPTION_NAMES


@pytest.mark.parametrize("kind", PACKED)
def test_a_stranger_is_an_error_that_lists_the_options(kind):
    with pytest.raises(TypeError, match="'sparcity' is no option; the pruning options are sparsity, begin_step"):
        kind(weights(), sparcity=0.5)


@pytest.mark.parametrize("kind", HOOKED)
def test_a_stranger_to_hooks_is_an_error(kind):
    with pytest.raises(TypeError, match="sparcity"):
        kind(weights(), sparcity=0.5)


@pytest.mark.parametrize("kind", [*PACKED, *HOOKED])
def test_every_option_reaches_the_pruning(kind):
    given = {"sparsity": 0.5, "begin_step": 3, "end_step": 30, "frequency": 7, "scope": "erk"}
    optimizer = kind(weights(), **given)
    assert {name: getattr(optimizer.pruning.options, name) for name in given} == given


@pytest.mark.parametrize("kind", [*PACKED, *HOOKED])
@pytest.mark.parametrize("end", [60.6, "60", np.float32(60.5)])
def test_steps_are_whole_numbers(kind, end):
    with pytest.raises(ValueError, match="must be a whole number of optimizer steps"):
        kind(weights(), sparsity=0.5, end_step=end)


@pytest.mark.parametrize("end", [60.0, np.int64(60), torch.tensor(60)])
def test_whole_numbers_of_any_kind_are_taken(end):
    schedule = AdamWPrune(weights(), sparsity=0.5, end_step=end).schedule
    assert type(schedule.end_step) is int
    assert schedule.end_step == 60


@pytest.mark.parametrize("kind", PACKED)
def test_a_group_with_pruning_options_of_its_own_is_refused(kind):
    groups = [{"params": weights()}, {"params": weights(), "sparsity": 0.9}]
    with pytest.raises(ValueError, match=r"a parameter group has sparsity=0\.9, the optimizer 0\.5"):
        kind(groups, sparsity=0.5, end_step=10)
