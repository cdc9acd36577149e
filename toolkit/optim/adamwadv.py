"""AdamWAdv: AdamW with AMSGrad (arXiv 1904.09237) and the recipe the study ran it with.

The optimizer is torch's own `AdamW(amsgrad=True)`: 12 bytes of state a weight. What else belonged to "AdamWAdv", the
gradient clipping and the cosine schedule, is not an optimizer's business; train.py applies RECIPE unless a flag says
otherwise, and logs it.
"""

from typing import Any

from torch.optim import AdamW

RECIPE: dict[str, Any] = {"clip_grad": 1.0, "sched": "cosine"}


class AdamWAdv(AdamW):
    """torch's AdamW with AMSGrad on."""

    def __init__(self, params: Any, lr: float = 1e-3, amsgrad: bool = True, **options: Any) -> None:
        super().__init__(params, lr=lr, amsgrad=amsgrad, **options)
