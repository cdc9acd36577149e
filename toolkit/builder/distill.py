"""--kd-model-name: a teacher's scores are learned beside the labels (Hinton et al., arXiv 1503.02531), as timm does it.

The teacher looks at a batch before the model does: what its forward pass takes is gone when activations come. Its
log-probabilities go to the loss with the targets. Of timm's three kinds this is `logit`; the equation is that of
timm.task.LogitDistillationTask, which can neither look first nor at grey images.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.builder.data import Augment, input_settings
from toolkit.builder.model import amp_dtype, create_model
from toolkit.builder.weights import load_teacher
from toolkit.config import Config
from toolkit.errors import blaming, refuse

Loss = Callable[[Tensor, Any], Tensor]
_SCALES = ("mean", "std")
_OF_TRAINING = ("drop_path", "drop_block", "head_init_scale", "head_init_bias", "bn_momentum", "layer_decay")


def create_teacher(config: Config, num_classes: int) -> nn.Module:
    """The teacher, on the host, that learns nothing and draws nothing from the run's generator.

    Of the model's own name it has the model's --model-kwargs, --gp and --bn-eps too. Raises ValueError for a model or
    weights that do not give scores of these classes.
    """
    name, num_classes = str(config.kd_model_name), config.num_classes or num_classes
    given = None if config.kd_checkpoint else timm.get_pretrained_cfg(name)
    classes = num_classes if given is None else given.num_classes
    with blaming(f"--kd-model-name {name}"):
        refuse(
            {
                f"timm's weights are for {classes} classes, the data has {num_classes}; give your own with "
                "--kd-checkpoint": classes != num_classes
            }
        )
    teacher = _make(config, num_classes, pretrained=not config.kd_checkpoint)
    if config.kd_checkpoint:
        load_teacher(teacher, config)
    return teacher.requires_grad_(False).eval()


def _make(config: Config, num_classes: int, *, pretrained: bool) -> nn.Module:
    of_student: dict[str, Any] = {"model_kwargs": {}, "gp": None, "bn_eps": None}
    of_training: dict[str, Any] = {"drop": 0.0, **dict.fromkeys(_OF_TRAINING)}
    asked = dataclasses.replace(
        config,
        model=str(config.kd_model_name),
        pretrained=pretrained,
        initial_checkpoint="",
        **of_training | ({} if config.kd_model_name == config.model else of_student),
    )
    with blaming(f"--kd-model-name {config.kd_model_name}"), torch.random.fork_rng(devices=[]):
        return create_model(asked, num_classes)


def teacher_bytes(config: Config, num_classes: int) -> int:
    """What a teacher takes on each rank, by its shapes alone; 0 without one."""
    if not config.kd_model_name:
        return 0
    module = _make(config, num_classes, pretrained=False)
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


class Teacher:
    """A teacher on the device, and what it adds to a step."""

    def __init__(self, config: Config, num_classes: int, student: nn.Module) -> None:
        self._config = config
        module, weight = create_teacher(config, num_classes), next(student.parameters())
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        self.module = module.to(weight.device, weight.dtype).to(memory_format=layout)
        (self._mean, self._std), (mean, std) = (
            [torch.tensor(inputs[key], device=weight.device, dtype=weight.dtype).view(1, -1, 1, 1) for key in _SCALES]
            for inputs in (input_settings(config, student), input_settings(config, module))
        )
        self._normalised = None if torch.equal(self._mean, mean) and torch.equal(self._std, std) else (mean, std)

    def tensors(self) -> list[Tensor]:
        """What it holds, for the memory ledger."""
        return [*self.module.parameters(), *self.module.buffers()]

    @torch.no_grad()
    def _look(self, images: Tensor) -> Tensor:
        """Log-probabilities float32 [batch, classes] at the temperature, of images normalised for the model."""
        if self._normalised is not None:
            mean, std = self._normalised
            images = (images * self._std + self._mean - mean) / std
        dtype = amp_dtype(self._config)
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            scores = self.module(images)
        return functional.log_softmax(scores.float() / self._config.kd_temperature, dim=-1)

    def beside(self, change: Augment) -> Augment:
        """`change`, whose targets are then (targets, what the teacher says of the changed images)."""

        def changed(images: Tensor, labels: Tensor, number: int, epoch: int) -> tuple[Tensor, Any]:
            images, targets = change(images, labels, number, epoch)
            return images, (targets, self._look(images))

        return changed

    def and_labels(self, loss: Loss) -> Loss:
        """`loss` of the labels and the teacher's, weighted: arXiv 1503.02531 section 2, with T² on the teacher's."""
        task, temperature = self._config.task_loss_weight, self._config.kd_temperature
        weight = self._config.distill_loss_weight
        weight = (1.0 if task is None else 1.0 - task) if weight is None else weight
        task = 1.0 if task is None else task

        def both(scores: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
            labels, said = targets
            own = functional.log_softmax(scores / temperature, dim=-1)
            learned = functional.kl_div(own, said, reduction="batchmean", log_target=True) * temperature**2
            return task * loss(scores, labels) + weight * learned

        return both
