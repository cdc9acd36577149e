"""`python -m launch.bench equivalence`: every implementation against the reference, fed the same gradients.

A model's shapes, 200 steps of the same gradients (drawn anew from the step's number, so nothing is stored). Once with
the masks taken from the reference path, where only rounding may differ; once with masks of their own, where a weight
may be kept by one and pruned by the other only if its score lies at the threshold, which is counted.
"""

from collections.abc import Sequence
from typing import Any

import torch

from launch.bench.candidates import only
from launch.bench.optim import native_isas
from launch.bench.timing import DEVICE, device_name, parameter_shapes
from toolkit.markdown import page, table
from toolkit.optim import AdamWPrune, SGDPrune
from toolkit.progress import tracked
from toolkit.prune.mask import flat_view
from toolkit.prune.scores import STATE_SCORES

WEIGHT_LIMIT = 1e-5  # of each tensor's norm
SCORE_LIMIT = 1e-6  # distance of a differing weight's score to the threshold, relative


class _Path:
    """One implementation in training on the recorded gradients, with masks of its own or the reference's."""

    def __init__(
        self, kind: Any, shapes: Sequence[torch.Size], steps: int, implementation: str, isa: str | None, own_masks: bool
    ) -> None:
        self.name, self.isa, self.own_masks = f"{implementation} {isa or ''}".rstrip(), isa, own_masks
        self.differing = 0  # weights pruned here and not in the reference, or the other way round
        self.furthest = 0.0  # score of such a weight from the threshold when it became one
        self._pruned_here: dict[int, torch.Tensor] = {}  # which weights the reference keeps and this path does not
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator) * 0.05 for shape in shapes]
        self.parameters = [torch.nn.Parameter(weight.to(DEVICE)) for weight in weights]
        end = steps * 3 // 4
        self.optimizer = kind(
            self.parameters,
            lr=1e-3,
            sparsity=0.7,
            begin_step=end // 5,
            end_step=end,
            frequency=max(1, end // 15),
            implementation=implementation,
        )
        if not own_masks:
            self.optimizer.pruning.is_due = lambda step: False

    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        with only(self.isa):
            self.optimizer.step()

    def compare_masks(self, reference: "_Path") -> None:
        """After a mask update of the reference: take its masks, or count where the own ones differ."""
        if not self.own_masks:
            self._take_masks(reference)
            return
        score = STATE_SCORES[reference.optimizer.defaults["score"]]
        lowest = torch.inf  # score among the reference's survivors: the threshold
        appeared = []
        for index, state in reference.optimizer.state_dict()["state"].items():
            if "mask" not in state:
                continue
            kept = flat_view(state["mask"])
            pruned_here = kept & (flat_view(self.parameters[index].detach()) == 0)
            moments = {key: flat_view(value) for key, value in state.items() if key not in ("step", "mask")}
            scores = score(flat_view(reference.parameters[index].detach()), moments)
            lowest = min(lowest, float(scores[kept].min())) if bool(kept.any()) else lowest
            # A weight that came to differ at an earlier update has moved on since.
            appeared.append(scores[pruned_here & ~self._pruned_here.get(index, torch.zeros_like(pruned_here))])
            self._pruned_here[index] = pruned_here
        new = torch.cat(appeared) if appeared else torch.zeros(0)
        if new.numel():
            self.furthest = max(self.furthest, float(((new - lowest) / lowest).max()))
        self.differing = 2 * sum(int(marks.sum()) for marks in self._pruned_here.values())

    def _take_masks(self, reference: "_Path") -> None:
        saved = self.optimizer.state_dict()
        theirs = reference.optimizer.state_dict()["state"]
        for index, state in saved["state"].items():
            if "mask" in theirs[index]:
                state["mask"] = theirs[index]["mask"]
                with torch.no_grad():
                    self.parameters[index].mul_(state["mask"])
        self.optimizer.load_state_dict(saved)

    def result(self, reference: "_Path") -> dict[str, Any]:
        """The row of the report."""
        pairs = [(a.detach(), b.detach()) for a, b in zip(reference.parameters, self.parameters, strict=True)]
        both = [((a - b) * ((a == 0) == (b == 0)), a) for a, b in pairs]
        return {
            "name": self.name,
            "own_masks": self.own_masks,
            "differing": self.differing,
            "furthest_score": self.furthest,
            "same_masks": all(bool(((a == 0) == (b == 0)).all()) for a, b in pairs),
            "furthest_weight": max(float(difference.norm() / a.norm()) for difference, a in both),
        }


def _compare(kind: Any, shapes: Sequence[torch.Size], steps: int) -> list[dict[str, Any]]:
    reference = _Path(kind, shapes, steps, "reference", None, own_masks=True)
    # What runs here at full size.
    full: list[tuple[str, str | None]] = [("triton", None)] if DEVICE == "cuda" else []
    full += [("native", isa) for isa in native_isas()]
    paths = [_Path(kind, shapes, steps, *which, own) for which in full for own in (False, True)]
    for step in tracked(range(1, steps + 1), "steps", kind.__name__):
        generator = torch.Generator().manual_seed(1_000 + step)
        gradients = [(torch.randn(shape, generator=generator) * 0.01).to(DEVICE) for shape in shapes]
        for path in (reference, *paths):
            path.step(gradients)
        if reference.optimizer.pruning.is_due(step):
            for path in paths:
                path.compare_masks(reference)
    return [path.result(reference) for path in paths]


def bench_equivalence(model: str, steps: int) -> dict[str, Any]:
    """The comparison for adamwprune and sgdprune, as one JSON object."""
    shapes = parameter_shapes(model)
    return {
        "schema": "bench-equivalence/1",
        "model": model,
        "steps": steps,
        "sparsity": 0.7,
        "device": device_name(),
        "torch": torch.__version__,
        "weight_limit": WEIGHT_LIMIT,
        "score_limit": SCORE_LIMIT,
        "prunable_weights": sum(shape.numel() for shape in shapes if len(shape) > 1 and shape[0] > 1),
        "optimizers": {kind.__name__: _compare(kind, shapes, steps) for kind in (AdamWPrune, SGDPrune)},
    }


def to_markdown(result: dict[str, Any], command: str) -> str:
    """The table for results/bench/."""
    rows = [
        [
            optimizer,
            row["name"],
            "own" if row["own_masks"] else "the reference's",
            f"{row['furthest_weight']:.1e}",
            row["differing"],
            f"{row['furthest_score']:.1e}" if row["differing"] else "",
        ]
        for optimizer, paths in result["optimizers"].items()
        for row in paths
    ]
    header = ["optimizer", "implementation", "masks", "distance of weights", "pruned differently"]
    return page(
        f"# Every implementation against the reference: {result['model']}'s shapes, {result['steps']} steps",
        "",
        f"{result['device']}, torch {result['torch']}; {result['prunable_weights']:,} prunable weights, to "
        f"{result['sparsity']:.0%} sparsity, the same gradients for all. Made by `{command}`.",
        "",
        "Distance of weights: the largest over the tensors of |difference| / |tensor| (2-norms), of weights that "
        f"both keep (bar: ≤ {result['weight_limit']:.0e}). With masks of its own a path may differ from the "
        "reference only in weights whose score lies at the threshold; distance of scores is the furthest of these, "
        f"relative (bar: ≤ {result['score_limit']:.0e}).",
        "",
        *table([*header, "distance of scores"], rows, text=(0, 1, 2)),
    )
