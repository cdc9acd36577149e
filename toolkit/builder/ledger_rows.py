"""What a rank holds between steps, by arithmetic and on each engine: the predicted rows of the memory ledger.

Sizes follow from whole shapes and the number of ranks, as torch's fully_shard and DeepSpeed cut and pad them; how many
weights survive where is read off this rank's masks.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from toolkit.builder.optimizer import final_sparsity, moments_beside
from toolkit.config import Config
from toolkit.engine.engines.ddp import Engine
from toolkit.memory.arithmetic import ParameterFacts, predict_optimizer_rows
from toolkit.memory.ledger import storage_key
from toolkit.optim.registry import OptimizerSpec
from toolkit.prune.budget import budget_for
from toolkit.prune.distributed import to_local
from toolkit.prune.mask import unpack_bits
from toolkit.prune.moments import STATE_DTYPES
from toolkit.prune.spans import Ranges, make_spans, whole_range

_ZERO_ALIGNMENT = 2  # elements: DeepSpeed's nccl_start_alignment_factor; a slice of ZeRO-1 and 2 is a multiple


def rows_between_steps(
    config: Config,
    spec: OptimizerSpec | None,
    method: str,
    parameters: Sequence[ParameterFacts],
    buffers_bytes: int,
    num_ranks: int,
) -> dict[str, int]:
    """Ledger rows of a rank that holds everything (one rank, or DDP), between steps; of the optimizer where `spec` is.

    With several ranks the gradients are views of DDP's buckets, which stand from the second step on.
    """
    weights = sum(one.nbytes for one in parameters)
    trained = [one for one in parameters if one.trained]
    gradients = sum(one.nbytes for one in trained)
    rows = {
        "weights": weights,
        "buffers": buffers_bytes,
        "gradients": 0 if num_ranks > 1 or config.fused_backward else gradients,
        "ddp_buckets": gradients if num_ranks > 1 else 0,
        "ema": weights + buffers_bytes if config.model_ema else 0,
    }
    return rows | _optimizer_rows(config, spec, method, trained)


def _optimizer_rows(
    config: Config,
    spec: OptimizerSpec | None,
    method: str,
    trained: Sequence[ParameterFacts],
    budget_dtype: str | None = None,
) -> dict[str, int]:
    """`budget_dtype` is what --state-budget has chosen; None where it follows from the survivors of `trained`."""
    if spec is None:
        return {}
    asked = {key: getattr(config, key) or config.opt_kwargs.get(key) for key in ("state_dtype", "state_budget")}
    dtype, budgeted = asked["state_dtype"] or budget_dtype or moments_beside(config, spec), budget_dtype is not None
    if budget_dtype is None:
        prunable = [one for one in trained if one.prunable]
        final_zeros = math.floor(final_sparsity(config, spec.method) * sum(one.numel for one in prunable))
        start_zeros = math.floor(config.prune_start * sum(one.numel for one in prunable))
        budget = budget_for(asked["state_budget"], [one.numel for one in prunable], len(spec.moments), final_zeros)
        if budget is not None:
            budget = budget.starting_with(start_zeros)
            dtype, budgeted = budget.widest(sum(one.survivors for one in prunable)), True
    return predict_optimizer_rows(
        trained,
        spec.moments,
        counts_steps=spec.counts_steps,
        method=method,
        score=config.prune_score,
        state_dtype=dtype,
        budgeted=budgeted,
    )


def rows_of_engine(
    config: Config, spec: OptimizerSpec | None, method: str, engine: Engine, num_ranks: int
) -> dict[str, int]:
    """Ledger rows of this rank between steps, as its engine stands; of the optimizer where `spec` is."""
    module: Any = engine.module
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    if engine.name == "ddp":
        facts = [
            _facts(parameter, parameter.numel(), engine, trained=parameter.requires_grad)
            for parameter in module.parameters()
        ]
        return rows_between_steps(config, spec, method, facts, buffers, num_ranks)
    rows, trained = (_fsdp2_share if engine.name == "fsdp2" else _zero_share)(engine, num_ranks)
    rows["buffers"], rows["ddp_buckets"] = buffers, 0
    rows["ema"] = sum(held.numel() * held.itemsize for held in engine.held().parameters()) if config.model_ema else 0
    budgeted = config.state_budget or config.opt_kwargs.get("state_budget")
    dtype = _dtype_now(engine, spec.moments[0]) if budgeted and spec is not None and spec.moments else None
    return rows | _optimizer_rows(config, spec, method, trained, dtype)


def _facts(
    owned: Tensor, numel: int, engine: Engine, trained: bool = True, ranges: Ranges | None = None
) -> ParameterFacts:
    """Of what the optimizer is shown, of which this rank has `numel` weights; `ranges` says what a slice is made of."""
    mask = engine.optimizer_state.get(owned, {}).get("mask")
    survivors = numel if mask is None else int(unpack_bits(mask, numel).sum())
    spans = make_spans(numel, whole_range(owned) if ranges is None else ranges)
    return ParameterFacts(numel, mask is not None, survivors, owned.itemsize, trained, owned.numel(), spans)


def _dtype_now(engine: Engine, moment: str) -> str:
    """Of coded moments, by name: a budget chooses it by the survivors of all ranks, which none knows alone."""
    kept = {state[moment].dtype for state in engine.optimizer_state.values() if "mask" in state and moment in state}
    return next((name for name, dtype in reversed(STATE_DTYPES.items()) if dtype in kept), "float32")


def _fsdp2_share(engine: Engine, num_ranks: int) -> tuple[dict[str, int], list[ParameterFacts]]:
    """fully_shard gives every rank the bytes of the first one's rows, the last ones' padded; states are not padded."""
    padded = {
        parameter: -(-parameter.shape[0] // num_ranks) * math.prod(parameter.shape[1:]) * parameter.itemsize
        for parameter in engine.module.parameters()
    }
    trained = [parameter for parameter in padded if parameter.requires_grad]
    rows = {"weights": sum(padded.values()), "gradients": sum(padded[parameter] for parameter in trained)}
    return rows, [_facts(parameter, to_local(parameter).numel(), engine) for parameter in trained]


def _zero_share(engine: Any, num_ranks: int) -> tuple[dict[str, int], list[ParameterFacts]]:
    """ZeRO-1 and 2 cut a group into slices and pad its end; ZeRO-3 cuts and pads each parameter, which are then joined.

    ZeRO-3 keeps small parameters whole beside their parts, gradients in a buffer of their own, and its bucket.
    """
    parameters: list[Any] = list(engine.module.parameters())
    if engine.name == "zero3":
        sizes = [sum(-(-shape.numel() // num_ranks) for shape in one.shapes.values()) for one in engine.slices]
    else:
        step = _ZERO_ALIGNMENT * num_ranks
        totals = [sum(shape.numel() for shape in one.shapes.values()) for one in engine.slices]
        sizes = [_ZERO_ALIGNMENT * -(-total // step) for total in totals]
    trained = [
        _facts(one.flat, size, engine, ranges=engine.ranges_of(one.flat))
        for one, size in zip(engine.slices, sizes, strict=True)
    ]
    slices_bytes = sum(one.nbytes for one in trained)
    frozen_bytes = sum(one.nbytes for one in parameters if not one.requires_grad)
    rows = {"weights": slices_bytes * num_ranks + frozen_bytes, "gradients": 0, "zero_buckets": 0}
    rows["flat_copies"] = slices_bytes
    if engine.name == "zero3":
        parts = {one: -(-one.ds_numel // num_ranks) * one.itemsize for one in parameters}
        rows["weights"] = sum(part * (1 + num_ranks * one.ds_persist) for one, part in parts.items())
        rows["gradients"], rows["zero_buckets"] = slices_bytes, engine.bucket_bytes
        shared = {storage_key(one.ds_tensor) for one in parameters}
        if any(storage_key(one.flat) in shared for one in engine.slices):  # the parts themselves, where dtypes agree
            rows["flat_copies"] = 0
    return rows, trained
